"""Small kernels while other processes keep the processors busy: `python -m bench.busy_neighbours`.

A parallel region ends when all of its threads have been there. This shows what two threads make of
a linear layer, some Python between two calls, beside one thread, as neighbours become more.
"""

import argparse
import contextlib
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import torch

from bench.machine import processor
from sglite import _C, ops

_NEIGHBOUR = "import time\nend = time.monotonic() + 300\nwhile time.monotonic() < end: pass"


@contextlib.contextmanager
def neighbours(count: int) -> Iterator[None]:
    """So many processes that do nothing else than use a processor."""
    processes = [subprocess.Popen([sys.executable, "-c", _NEIGHBOUR]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def seconds(threads: int, count: int = 200) -> float:
    """Wall time of `count` calls, in a thread of its own, as the engine has one."""
    x, weight = torch.randn(256, 128), ops.pack_weight(torch.randn(384, 128))
    found = []

    def work() -> None:
        _C.set_num_threads(threads)
        start = time.perf_counter()
        for _ in range(count):
            ops.linear(x, weight)
            sum(range(3000))  # what an engine does between two kernels
        found.append(time.perf_counter() - start)

    torch.ones(1 << 20).exp()  # the caller's own OpenMP threads are there as well
    worker = threading.Thread(target=work)
    worker.start()
    worker.join()
    return found[0]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    print(f"{processor()}; medians of {repeats}, in turns, ms for 200 calls\n")
    print("| neighbours | one thread | two threads | times as long |\n|---|---|---|---|")
    for count in (0, 1, 2, 4):
        with neighbours(count):
            pairs = [(seconds(1), seconds(2)) for _ in range(repeats)]
        one, two = (1000 * statistics.median(times) for times in zip(*pairs, strict=True))
        print(f"| {count} | {one:.0f} | {two:.0f} | {two / one:.2f} |")


if __name__ == "__main__":
    main()
