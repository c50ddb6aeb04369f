"""What this machine can do at best: `python -m bench.limits`, figures as JSON.

Reading: a sum and a dot product over more memory than the last-level cache holds. Arithmetic: a
product of two square bfloat16 matrices through torch. The best of several is shown, since whatever
else runs only slows them down.
"""

import argparse
import json
import time

import torch


def read_gigabytes_per_second(num_bytes: int = 1 << 29, repeats: int = 9) -> float:
    """How fast torch's threads read memory in a row."""
    values = torch.ones(num_bytes // 4)
    halves = values.chunk(2)
    readers = [values.sum, lambda: torch.dot(*halves)]
    return num_bytes / 1e9 / min(_seconds(reader, repeats) for reader in readers)


def matmul_gigaflops_per_second(size: int = 2048, repeats: int = 5) -> float:
    """How fast torch multiplies bfloat16 matrices."""
    left, right = torch.randn(2, size, size).bfloat16().unbind()
    return 2 * size**3 / 1e9 / _seconds(lambda: left @ right, repeats)


def _seconds(call, repeats: int) -> float:
    """The shortest time of a call, the first one aside."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
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
