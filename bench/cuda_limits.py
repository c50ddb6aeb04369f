"""What this GPU can do at best: `python -m bench.cuda_limits`, figures as JSON.

Reading: sums and matrix-vector products over a tensor many times the size of the L2 cache. Copying
counts bytes read and bytes written. Arithmetic: a product of two square bfloat16 matrices through
torch. Launching: a kernel that does nothing much, as a node of a CUDA graph. All on random numbers,
since a GPU is faster on zeros.
"""

import json
from collections.abc import Callable, Sequence
from itertools import pairwise
from statistics import median

import torch
from torch import Tensor


def cuda_limits() -> dict[str, float]:
    """All figures of this page, by name. Takes about two seconds and 9 GB of the GPU's memory."""
    return {
        "read_gigabytes_per_second": read_gigabytes_per_second(),
        "copy_gigabytes_per_second": copy_gigabytes_per_second(),
        "matmul_teraflops_per_second": matmul_teraflops_per_second(),
        "graph_kernel_microseconds": graph_kernel_microseconds(),
    }


def read_gigabytes_per_second(num_bytes: int = 1 << 32, repeats: int = 20) -> float:
    """How fast kernels that only read get through memory: the best of several kernels and runs."""
    values = _random(num_bytes)
    rows = values.view(-1, 4096)
    vector = torch.randn(4096, device="cuda", dtype=values.dtype)
    readers = [
        values.view(torch.float32).sum,
        values.view(torch.int32).amax,
        lambda: torch.mv(rows, vector),
    ]
    return num_bytes / 1e9 / min(min(seconds_of_runs(run, repeats)) for run in readers)


def copy_gigabytes_per_second(num_bytes: int = 1 << 32, repeats: int = 20) -> float:
    """How fast a copy within the GPU's memory goes; its reads and its writes are counted."""
    source = _random(num_bytes)
    destination = torch.empty_like(source)
    times = seconds_of_runs(lambda: destination.copy_(source), repeats)
    return 2 * num_bytes / 1e9 / min(times)


def matmul_teraflops_per_second(size: int = 8192, repeats: int = 30) -> float:
    """The rate of bfloat16 matrix products that goes on: the median, as the clock gives way."""
    left, right = (torch.randn(size, size, device="cuda").bfloat16() for _ in range(2))
    out = torch.empty_like(left)
    times = seconds_of_runs(lambda: torch.mm(left, right, out=out), repeats)
    return 2 * size**3 / 1e12 / median(times)


def graph_kernel_microseconds(kernels: int = 1000) -> float:
    """What a kernel costs at least that follows another one in a CUDA graph."""
    value = torch.randn(1, device="cuda")
    value.neg_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(kernels):
            value.neg_()
    return min(seconds_of_runs(graph.replay, 10)) / kernels * 1e6


def seconds_of_runs(run: Callable[[], object], repeats: int) -> list[float]:
    """Times of single runs on the GPU, measured with events, after three that are not counted."""
    for _ in range(3):
        run()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        run()
        mark.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) / 1e3 for a, b in pairwise(marks)]


def graph_microseconds(calls: Sequence[Callable[[], object]], repeats: int = 9) -> float:
    """Median time of one of the calls, which run one after the other in a CUDA graph."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return median(seconds_of_runs(graph.replay, repeats)) / len(calls) * 1e6


def _random(num_bytes: int) -> Tensor:
    """Normal bfloat16 numbers, drawn in place."""
    return torch.empty(num_bytes // 2, dtype=torch.bfloat16, device="cuda").normal_()


if __name__ == "__main__":
    print(json.dumps(cuda_limits()))
