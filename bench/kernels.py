"""Measures the linear layer beside torch's own: `python bench/kernels.py --shapes 576x1536`.

M = 1 is shown in GB/s of weights read, beside a streaming read (torch.dot of two halves of a large
tensor); more rows in GFLOP/s. Weights rotate over more memory than the last-level cache holds,
contenders take turns, and the medians of many turns are shown. With one thread it is the thread's
processor time that counts, which other processes disturb less.
"""

import argparse
import time
from itertools import cycle
from statistics import median

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from sglite import _C, ops

SHAPES = ["576x1536", "1024x3072", "3072x1024", "4096x4096", "1024x151936", "576x49152"]


def shape_of(text: str) -> tuple[int, int]:
    k, n = text.split("x")
    return int(k), int(n)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", type=shape_of, metavar="KxN")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 16, 256, 2048], metavar="M")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--path", default=_C.cpu_path(), help="avx512, avx2 or portable")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each figure")
    parser.add_argument("--rotate-mb", type=int, default=256, help="weights to rotate over")
    parser.add_argument("--plain", action="store_true", help="also our op on row-major weights")
    options = parser.parse_args()
    options.shapes = options.shapes or [shape_of(text) for text in SHAPES]
    return options


def seconds_of_each(contenders, seconds: float, clock) -> list[float]:
    """Median time of one call of each. They take turns of a few calls, about 2 ms, so that the
    caches another contender has filled with its own disturb only the first of them.
    """
    times = [[] for _ in contenders]

    def call(index):
        start = clock()
        contenders[index]()
        times[index].append(clock() - start)

    for index in 2 * list(range(len(contenders))):
        call(index)
    calls = [1 + int(0.002 / taken[-1]) for taken in times]
    end = time.perf_counter() + seconds * len(contenders)
    while time.perf_counter() < end or len(times[0]) < 4:
        for index, count in enumerate(calls):
            for _ in range(count):
                call(index)
    return [median(taken) for taken in times]


def rotating(run, weights):
    """Calls `run(weight)` on one weight after the other."""
    supply = cycle(weights)
    return lambda: run(next(supply))


def measure(k: int, n: int, options, memory: Tensor) -> list[str]:
    """The cells of one row of the table."""
    dtype = getattr(torch, options.dtype)
    weight = torch.randn(n, k).to(dtype)
    weight_bytes = weight.numel() * weight.element_size()
    copies = max(2, -(-options.rotate_mb * 2**20 // weight_bytes))
    plain = [weight.clone() for _ in range(copies)]
    packed = [ops.pack_weight(weight) for _ in range(copies)]
    cells = [f"{k}, {n}"]
    for rows in options.rows:
        x = torch.randn(rows, k).to(dtype)
        contenders = [
            rotating(lambda weight, x=x: ops.linear(x, weight), packed),
            rotating(lambda weight, x=x: F.linear(x, weight), plain),
        ]
        if options.plain:
            contenders.insert(1, rotating(lambda weight, x=x: ops.linear(x, weight), plain))
        if rows == 1:
            contenders.append(lambda: torch.dot(*memory))
        clock = time.thread_time if options.threads == 1 else time.perf_counter
        times = seconds_of_each(contenders, options.seconds, clock)
        work = [weight_bytes if rows == 1 else 2 * rows * n * k] * len(times)
        if rows == 1:
            work[-1] = memory.numel() * memory.element_size()
        cells.append(
            " / ".join(
                f"{amount / taken / 1e9:.{1 if rows == 1 else 0}f}"
                for amount, taken in zip(work, times, strict=True)
            )
        )
    return cells


def main():
    options = arguments()
    torch.set_num_threads(options.threads)
    _C.set_num_threads(options.threads)
    _C.select_cpu_path(options.path)
    ours = "packed / plain" if options.plain else "packed"
    print(f"{options.dtype}, {options.threads} threads, path {options.path}")
    memory = torch.ones(2, options.rotate_mb * 2**17)
    heads = [
        f"M=1 GB/s: {ours} / F.linear / read" if rows == 1 else f"M={rows} GFLOP/s"
        for rows in options.rows
    ]
    print("| K, N | " + " | ".join(heads) + " |\n|" + "---|" * (len(heads) + 1))
    for k, n in options.shapes:
        print("| " + " | ".join(measure(k, n, options, memory)) + " |", flush=True)


if __name__ == "__main__":
    main()
