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

import torch
from torch import Tensor
from torch.nn import functional

from bench.cuda_limits import graph_microseconds, read_gigabytes_per_second
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


def layer_calls(layers: dict, rows: int, arena: Tensor) -> dict[str, list[Callable]]:
    """The linear layers of decoder layers one after the other, as they are in a decode step."""
    used = {name: shape for name, shape in layers.items() if name != "head"}
    width = used["qkv"][1]
    hidden, norm = arena.new_empty(rows, width).normal_(), arena.new_ones(width)
    attended = arena.new_empty(rows, used["o"][1]).normal_()
    each = sum(n * k for n, k in used.values())
    ours, theirs = [], []
    for layer in range(min(16, arena.numel() // each)):
        at, weights = layer * each, {}
        for name, (n, k) in used.items():
            weights[name] = arena[at : at + n * k].view(n, k)
            at += n * k

        def run(qkv, o, gate_up, down):
            ops.norm_linear(hidden, norm, 1e-5, qkv)
            x = ops.linear(attended, o, residual=hidden)
            x = ops.norm_gated_linear(x, norm, 1e-5, gate_up, activation="silu")
            return ops.linear(x, down, residual=hidden)

        def run_torch(qkv, o, gate_up, down):
            functional.linear(functional.rms_norm(hidden, (width,), norm), qkv)
            x = functional.linear(attended, o) + hidden
            gate, up = functional.linear(functional.rms_norm(x, (width,), norm), gate_up).chunk(
                2, -1
            )
            return functional.linear(functional.silu(gate) * up, down) + hidden

        ours.append(lambda weights=weights, run=run: run(**weights))
        theirs.append(lambda weights=weights, run=run_torch: run(**weights))
    return {"ours": ours, "torch": theirs}


def measure(rows: list[int], repeats: int) -> dict:
    """All figures, in microseconds, with the machine's read bandwidth."""
    bandwidth = read_gigabytes_per_second()
    arena = torch.empty(ARENA_BYTES // 2, dtype=torch.bfloat16, device="cuda").normal_(0, 0.02)
    table = []
    for model, layers in MODELS.items():
        elements = sum(n * k for name, (n, k) in layers.items() if name != "head")
        for count in rows:
            times = {
                name: graph_microseconds(calls, repeats)
                for name, calls in layer_calls(layers, count, arena).items()
            }
            table.append(
                {"model": model, "layer": "all four", "rows": count, "n": elements, "k": 1} | times
            )
        for layer, (n, k) in layers.items():
            for count in rows:
                times = {
                    name: graph_microseconds(calls, repeats)
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
