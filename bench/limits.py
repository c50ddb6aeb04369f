"""What this machine can do at best: `python -m bench.limits`, figures as JSON.

Reading: a sum and a dot product over more memory than the last-level cache holds. Arithmetic: a
product of two square matrices through torch, in bfloat16 or float32, whichever is faster here (a
processor without bfloat16 instructions multiplies it a hundred times slower). The best of several
is shown, since whatever else runs only slows them down.
"""

import argparse
import json
import time
from collections.abc import Callable

import torch

Clock = Callable[[], float]


def read_gigabytes_per_second(
    num_bytes: int = 1 << 29, repeats: int = 9, clock: Clock = time.perf_counter
) -> float:
    """How fast torch's threads read memory in a row."""
    values = torch.ones(num_bytes // 4)
    halves = values.chunk(2)
    readers = [values.sum, lambda: torch.dot(*halves)]
    return num_bytes / 1e9 / min(_seconds(reader, repeats, clock) for reader in readers)


def matmul_gigaflops_per_second(size: int = 2048, repeats: int = 5) -> float:
    """How fast torch multiplies square matrices, in the faster of bfloat16 and float32."""
    dtypes = {
        dtype: product_gigaflops_per_second(dtype, 512, 2)
        for dtype in (torch.bfloat16, torch.float32)
    }
    return product_gigaflops_per_second(max(dtypes, key=dtypes.get), size, repeats)


def product_gigaflops_per_second(
    dtype: torch.dtype, size: int = 2048, repeats: int = 5, clock: Clock = time.perf_counter
) -> float:
    """How fast torch multiplies square matrices of a data type."""
    left, right = torch.randn(2, size, size).to(dtype).unbind()
    return 2 * size**3 / 1e9 / _seconds(lambda: left @ right, repeats, clock)


def _seconds(call, repeats: int, clock: Clock) -> float:
    """The shortest time of a call, the first one aside."""
    call()
    times = []
    for _ in range(repeats):
        start = clock()
        call()
        times.append(clock() - start)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-threads", type=int, required=True)
    torch.set_num_threads(parser.parse_args().num_threads)
    figures = {
        "read_gigabytes_per_second": read_gigabytes_per_second(),
        "matmul_gigaflops_per_second": matmul_gigaflops_per_second(),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
