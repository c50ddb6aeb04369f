"""Measures the small CUDA kernels beside torch's own: `python -m bench.cuda_elementwise`.

For each op, at the shapes of some models: microseconds of one call of ours and of torch's eager
code for the same, and the bytes that the op must move as a share of what a large copy moves on this
machine. Calls are captured into a CUDA graph, over random data in more buffers than the caches hold
where that is affordable, and the median replay is divided by the number of calls. Kernels of ours
that follow each other overlap there as they do in a model.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from bench.cuda_limits import copy_gigabytes_per_second, graph_microseconds
from sglite import ops

DEVICE, DTYPE = "cuda", torch.bfloat16


@dataclass(frozen=True)
class Shape:
    """The numbers of a model that these ops see."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: int
    qk_norm: bool = False


MODELS = {
    "Llama-3.1-8B": Shape(4096, 14336, 32, 8, 128, 32),
    "Llama-3.2-1B": Shape(2048, 8192, 32, 8, 64, 16),
    "Qwen3-0.6B": Shape(1024, 3072, 16, 8, 128, 28, qk_norm=True),
}


@dataclass
class Op:
    """One op at one shape: what both sides call, on a set of buffers of its own."""

    name: str
    num_bytes: int  # that must be read and written
    ours: Callable[[], object]
    torchs: Callable[[], object] | None


def random(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(DTYPE)


def norm_op(model: Shape, tokens: int) -> Op:
    x, weight, out = (
        random(tokens, model.hidden),
        random(model.hidden),
        random(tokens, model.hidden),
    )
    return Op(
        "rms_norm",
        2 * x.nbytes,
        lambda: ops.rms_norm(x, weight, 1e-5, out=out),
        lambda: F.rms_norm(x, (model.hidden,), weight, 1e-5),
    )


def residual_norm_op(model: Shape, tokens: int) -> Op:
    x, weight, out = (
        random(tokens, model.hidden),
        random(model.hidden),
        random(tokens, model.hidden),
    )
    residual = random(tokens, model.hidden)

    def torchs():
        residual.add_(x)
        return F.rms_norm(residual, (model.hidden,), weight, 1e-5)

    return Op(
        "rms_norm, residual",
        4 * x.nbytes,
        lambda: ops.rms_norm(x, weight, 1e-5, residual=residual, out=out),
        torchs,
    )


def activation_op(model: Shape, tokens: int) -> Op:
    x, out = random(tokens, 2 * model.intermediate), random(tokens, model.intermediate)

    def torchs():
        gate, up = x.chunk(2, -1)
        return F.silu(gate) * up

    return Op("silu_and_mul", x.nbytes + out.nbytes, lambda: ops.silu_and_mul(x, out=out), torchs)


def embedding_op(model: Shape, tokens: int) -> Op:
    table = TABLES.setdefault(model.hidden, random(128256, model.hidden))
    ids = torch.randint(0, len(table), (tokens,), device=DEVICE)
    return Op(
        "embedding",
        2 * tokens * model.hidden * DTYPE.itemsize,
        lambda: ops.embedding(ids, table),
        lambda: F.embedding(ids, table),
    )


TABLES: dict[int, Tensor] = {}


def attention_ops(model: Shape, tokens: int) -> list[Op]:
    """The fused kernel, and the kernels that it stands for."""
    counts = [model.heads, model.kv_heads, model.kv_heads]
    qkv = random(tokens, sum(counts) * model.head_dim)
    q, k, v = qkv.unflatten(1, (-1, model.head_dim)).split(counts, 1)
    positions = torch.randint(0, 4096, (tokens,), device=DEVICE)
    angles = torch.rand(4096, model.head_dim // 2, device=DEVICE)
    cos_sin = torch.cat([angles.cos(), angles.sin()], 1)
    pages = tokens // 16 + 2
    k_cache, v_cache = (random(pages, 16, model.kv_heads, model.head_dim) for _ in range(2))
    slots = torch.randperm(pages * 16, device=DEVICE)[:tokens]
    q_norm = k_norm = None
    if model.qk_norm:
        q_norm, k_norm = random(model.head_dim), random(model.head_dim)
    arguments = positions, cos_sin, k_cache, v_cache, slots
    norms = {"q_norm": q_norm, "k_norm": k_norm}

    def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

    def torchs():
        cos, sin = cos_sin[positions].to(DTYPE)[:, None].chunk(2, -1)
        queries, keys = q, k
        if q_norm is not None:
            queries = F.rms_norm(q, (model.head_dim,), q_norm, 1e-6)
            keys = F.rms_norm(k, (model.head_dim,), k_norm, 1e-6)
        k_cache.view(-1, *k.shape[1:])[slots] = rotated(keys, cos, sin)
        v_cache.view(-1, *v.shape[1:])[slots] = v
        return rotated(queries, cos, sin)

    def parts():
        queries, keys = q, k
        if q_norm is not None:
            queries = ops.rms_norm(q.contiguous(), q_norm, 1e-6)
            keys = ops.rms_norm(k.contiguous(), k_norm, 1e-6)
        ops.apply_rope(queries, keys, positions, cos_sin)
        ops.write_kv(keys, v, k_cache, v_cache, slots)

    table_bytes = tokens * model.head_dim * 4
    rotated_bytes = 2 * (q.numel() + k.numel()) * DTYPE.itemsize
    return [
        Op(
            "rope_and_write_kv",
            2 * qkv.nbytes + table_bytes,
            lambda: ops.rope_and_write_kv(qkv, *arguments, **norms),
            torchs,
        ),
        Op("its parts", 2 * qkv.nbytes + table_bytes, parts, None),
        Op(
            "apply_rope",
            rotated_bytes + table_bytes,
            lambda: ops.apply_rope(q, k, positions, cos_sin),
            None,
        ),
        Op(
            "write_kv",
            4 * k.numel() * DTYPE.itemsize,
            lambda: ops.write_kv(k, v, k_cache, v_cache, slots),
            None,
        ),
    ]


def copy_op(model: Shape, count: int) -> Op:
    """Copy on write of `count` slots in all layers."""
    caches = [random(256, 16, model.kv_heads, model.head_dim) for _ in range(2 * model.layers)]
    order = torch.randperm(4096, device=DEVICE)
    sources, destinations = order[:count], order[count : 2 * count]

    def torchs():
        for cache in caches:
            slots = cache.view(-1, *cache.shape[2:])
            slots.index_copy_(0, destinations, slots.index_select(0, sources))

    num_bytes = 2 * count * sum(cache[0, 0].nbytes for cache in caches)
    return Op(
        "copy_kv_slots",
        num_bytes,
        lambda: ops.copy_kv_slots(caches, sources, destinations),
        torchs,
    )


def all_ops(model: Shape, tokens: int) -> list[Op]:
    makers = [norm_op, residual_norm_op, activation_op, embedding_op]
    return [make(model, tokens) for make in makers] + attention_ops(model, tokens)


def microseconds(calls: Sequence[Callable[[], object]]) -> float:
    """Median time of one of the calls, repeated until they fill a graph."""
    return graph_microseconds(list(calls) * max(1, 48 // len(calls)))


def rows(model: Shape, tokens: int, rate: float) -> Iterator[dict]:
    """Figures of all ops at one shape."""
    first = all_ops(model, tokens)
    sets = max(1, min(24, 200_000_000 // max(op.num_bytes for op in first)))
    buffers = [first, *(all_ops(model, tokens) for _ in range(sets - 1))]
    for same in zip(*buffers, strict=True):
        op = same[0]
        ours = microseconds([each.ours for each in same])
        yield {
            "op": op.name,
            "tokens": tokens,
            "us": ours,
            "share": op.num_bytes / rate / ours,
            "torch_us": op.torchs and microseconds([each.torchs for each in same]),
        }


def copy_row(model: Shape, count: int, rate: float) -> dict:
    op = copy_op(model, count)
    ours = microseconds([op.ours])
    return {
        "op": op.name,
        "tokens": count,
        "us": ours,
        "share": op.num_bytes / rate / ours,
        "torch_us": microseconds([op.torchs]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 64, 8192])
    parser.add_argument("--json", help="also write the figures into this file")
    options = parser.parse_args()
    torch.manual_seed(0)
    rate = copy_gigabytes_per_second() * 1e3  # bytes per microsecond
    print(f"{torch.cuda.get_device_name()}, copy {rate / 1e6:.2f} TB/s, {DTYPE}")
    print("| model | tokens | op | us | share of copy | torch us |\n|---|---|---|---|---|---|")
    figures = []
    for name in options.models:
        model = MODELS[name]
        shapes = (rows(model, tokens, rate) for tokens in options.tokens)
        for row in [*(row for group in shapes for row in group), copy_row(model, 15, rate)]:
            figures.append({"model": name, **row})
            torchs = "" if row["torch_us"] is None else f"{row['torch_us']:.2f}"
            print(
                f"| {name} | {row['tokens']} | {row['op']} | {row['us']:.2f} | "
                f"{row['share']:.0%} | {torchs} |",
                flush=True,
            )
        TABLES.clear()
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"copy_bytes_per_us": rate, "figures": figures}, file, indent=1)


if __name__ == "__main__":
    main()
