"""The linear op over quantised weights beside bfloat16: `python -m bench.quantized_linear`.

A call reads another weight each time, `--rotate-mb` of them, more than the last-level cache holds.
With one thread the clock is the thread's own, which does not run while others have the processor.
Markdown: per shape and number of rows how many times as fast as bfloat16 each is, and at M = 1 the
bytes of weights it reads per second.
"""

import argparse
import time

import torch

from bench.kernels import rotating, seconds_of_each
from sglite import _C, ops
from sglite.ops import QuantizedLayout

_SHAPES = [(576, 1536), (1024, 3072), (3072, 1024), (4096, 4096)]


def contenders(k: int, n: int, num_bytes: int) -> dict[str, tuple[list, int]]:
    """Per name the weights to rotate, and the bytes of one."""
    weight = torch.randn(n, k).bfloat16()
    group = 128 if k % 128 == 0 else 64
    layouts = {
        "int8": QuantizedLayout(8, k),
        "int4": QuantizedLayout(4, group, scale_dtype=torch.bfloat16),
        "int4, zero points": QuantizedLayout(4, group, True, torch.bfloat16),
        "int4, groups of 32": QuantizedLayout(4, 32, scale_dtype=torch.bfloat16),
    }
    makers = {"bfloat16": lambda: ops.pack_weight(weight)}
    makers |= {
        name: lambda layout=layout: ops.quantize_weight(weight, layout)
        for name, layout in layouts.items()
    }
    made = {}
    for name, make in makers.items():
        first = make()
        size = weight.nbytes if name == "bfloat16" else first.nbytes
        made[name] = [first, *(make() for _ in range(num_bytes // size))], size
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 8, 16, 64, 256])
    parser.add_argument("--rotate-mb", type=int, default=96)
    parser.add_argument("--seconds", type=float, default=0.3, help="for each contender")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    _C.set_num_threads(options.threads)
    clock = time.thread_time if options.threads == 1 else time.perf_counter
    head = None
    for k, n in _SHAPES:
        made = contenders(k, n, options.rotate_mb << 20)
        if head is None:
            head = ["K, N", "M", "bfloat16", *list(made)[1:]]
            print(f"{options.threads} threads, path {_C.cpu_path()}, x in bfloat16\n")
            print("| " + " | ".join(head) + " |\n|---|---:|" + "---:|" * len(made))
        for rows in options.rows:
            x = torch.randn(rows, k).bfloat16()
            runs = [
                rotating(lambda weight, x=x: ops.linear(x, weight), weights)
                for weights, _ in made.values()
            ]
            times = seconds_of_each(runs, options.seconds, clock)
            sizes = [size for _, size in made.values()]
            cells = [
                f"{size / taken / 1e9:.1f} GB/s"
                if rows == 1
                else f"{2 * rows * n * k / taken / 1e9:.0f} GFLOP/s"
                for taken, size in zip(times, sizes, strict=True)
            ]
            for index in range(1, len(cells)):
                cells[index] = f"x {times[0] / times[index]:.2f} ({cells[index]})"
            print(f"| {k}, {n} | {rows} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
