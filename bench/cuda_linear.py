"""Times linear layers of few rows beside torch's: `python -m bench.cuda_linear`.

For the layers and heads of some models and for 1 to 64 rows: microseconds of ours and of
`torch.nn.functional.linear`, and the share of the measured read bandwidth that ours gets out of the
weights. A CUDA graph goes round over more weights than the L2 cache holds, so that every one is
read from memory; launches follow one another as they do in a decode step. A head's logits are
float32 (torch's are rounded to bfloat16).
"""

import argparse
import json
from collections.abc import Callable
from itertools import pairwise
from statistics import median

import torch
from torch import Tensor
from torch.nn import functional

from bench.cuda_limits import read_gigabytes_per_second
from sglite import ops

# Per model and layer (n, k).
MODELS = {
    "Llama-3.1-8B": {
        "qkv": (6144, 4096),
        "o": (4096, 4096),
        "gate_up": (28672, 4096),
        "down": (4096, 14336),
        "head": (128256, 4096),
    },
    "Llama-3.2-1B": {
        "qkv": (3072, 2048),
        "o": (2048, 2048),
        "gate_up": (16384, 2048),
        "down": (2048, 8192),
        "head": (128256, 2048),
    },
    "Qwen3-0.6B": {
        "qkv": (4096, 1024),
        "o": (1024, 2048),
        "gate_up": (6144, 1024),
        "down": (1024, 3072),
        "head": (151936, 1024),
    },
}
ROUND_BYTES = 600 << 20
ARENA_BYTES = 2100 << 20
MOST_CALLS = 64


def microseconds(calls: list[Callable[[], object]], repeats: int) -> float:
    """The median time of one call within a graph of all of them."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        graph.replay()
        mark.record()
    torch.cuda.synchronize()
    times = [a.elapsed_time(b) for a, b in pairwise(marks)]
    return median(times) * 1e3 / len(calls)


def contestants(layer: str, rows: int, n: int, k: int, arena: Tensor) -> dict[str, list[Callable]]:
    """Per contestant its calls, each with a weight of its own."""
    each = n * k
    places = [i * each for i in range(min(MOST_CALLS, arena.numel() // each))]
    count = max(2, min(MOST_CALLS, ROUND_BYTES // (2 * each)))
    weights = [arena[at : at + each].view(n, k) for at in (places * count)[:count]]
    x, norm = arena.new_empty(rows, k).normal_(), arena.new_empty(k).normal_()
    residual = arena.new_empty(rows, n).normal_()
    options = {"out_dtype": torch.float32} if layer == "head" else {}
    if layer in ("o", "down"):
        options["residual"] = residual
    invariant = {"batch_invariant": True}

    def calls(run: Callable[[Tensor], object]) -> list[Callable]:
        return [lambda weight=weight: run(weight) for weight in weights]

    runs = {
        "ours": calls(lambda w: ops.linear(x, w, **options)),
        "invariant": calls(lambda w: ops.linear(x, w, **options, **invariant)),
        "torch": calls(lambda w: functional.linear(x, w)),
    }
    if layer == "qkv":
        runs["fused"] = calls(lambda w: ops.norm_linear(x, norm, 1e-5, w))
        runs["parts"] = calls(lambda w: ops.linear(ops.rms_norm(x, norm, 1e-5), w))
    if layer == "gate_up":
        runs["fused"] = calls(lambda w: ops.norm_gated_linear(x, norm, 1e-5, w, activation="silu"))
        runs["parts"] = calls(
            lambda w: ops.silu_and_mul(ops.linear(ops.rms_norm(x, norm, 1e-5), w))
        )
    return runs


def measure(rows: list[int], repeats: int) -> dict:
    """All figures, in microseconds, with the machine's read bandwidth."""
    bandwidth = read_gigabytes_per_second()
    arena = torch.empty(ARENA_BYTES // 2, dtype=torch.bfloat16, device="cuda").normal_(0, 0.02)
    table = []
    for model, layers in MODELS.items():
        for layer, (n, k) in layers.items():
            for count in rows:
                times = {
                    name: microseconds(calls, repeats)
                    for name, calls in contestants(layer, count, n, k, arena).items()
                }
                table.append(
                    {"model": model, "layer": layer, "rows": count, "n": n, "k": k} | times
                )
    return {
        "gpu": torch.cuda.get_device_name(),
        "read_gigabytes_per_second": bandwidth,
        "microseconds": table,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", help="file for the figures")
    arguments = parser.parse_args()
    result = measure(arguments.rows, arguments.repeats)
    bandwidth = result["read_gigabytes_per_second"]
    print(f"{result['gpu']}, reads {bandwidth:.0f} GB/s")
    names = ("ours", "invariant", "torch", "fused", "parts")
    print(f"{'':24}rows  " + "".join(f"{name:>10}" for name in names) + "    GB/s  share")
    for row in result["microseconds"]:
        rate = 2 * row["n"] * row["k"] / row["ours"] / 1e3
        times = "".join(f"{row[name]:10.2f}" if name in row else " " * 10 for name in names)
        label = f"{row['model']:14}{row['layer']:10}{row['rows']:4}"
        print(f"{label}  {times}  {rate:6.0f}  {rate / bandwidth:5.0%}")
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(result, file, indent=1)


if __name__ == "__main__":
    main()
