"""Times paged decode and extend attention on a GPU, beside torch's scaled_dot_product_attention.

    python -m bench.cuda_attention [--dtype bfloat16] [--only "8b decode"] [--json out.json]

Every timing is a CUDA graph of many launches, going round over caches of more than the L2 cache
holds, with random numbers in shuffled pages. Bandwidth is that of the keys and values read, as a
share of what a plain read reaches on the same machine. torch gets dense keys and values of one
length. "plan" is the time of the planning kernel, which a step pays once.
"""

import argparse
import json
from pathlib import Path

import torch
from torch.nn.functional import scaled_dot_product_attention

from bench.cuda_limits import graph_microseconds, read_gigabytes_per_second
from sglite import ops

PAGE_SIZE = 16
# (query heads, KV heads, head size)
MODELS = {"8b": (32, 8, 128), "1b": (32, 8, 64), "0.6b": (16, 8, 128)}
BATCHES, CONTEXTS = (1, 8, 64, 256), (128, 1024, 4096, 8192, 32768)
MOST_BYTES = 24 << 30
ROUND_BYTES = 256 << 20  # what the launches of a graph read together, well above the L2 cache


def decode_case(batch, context, heads, kv_heads, head_dim, dtype, with_torch, shared=0):
    """Microseconds of one layer: ours, the plan, torch's (or None).

    The first `shared` positions of all requests are in the same pages.
    """
    pages = context // PAGE_SIZE
    one = 2 * batch * context * kv_heads * head_dim * dtype.itemsize
    rounds = max(2, min(64, ROUND_BYTES // one))
    device = "cuda"
    q = torch.randn(batch, heads, head_dim, device=device, dtype=dtype)
    table = torch.randperm(batch * pages, device=device, dtype=torch.int32).view(batch, pages)
    table[:, : shared // PAGE_SIZE] = table[0, : shared // PAGE_SIZE]
    start = torch.arange(batch + 1, device=device, dtype=torch.int32)
    lens = torch.full((batch,), context, device=device, dtype=torch.int32)
    shape = (rounds, 2, batch * pages, PAGE_SIZE, kv_heads, head_dim)
    caches = torch.empty(shape, device=device, dtype=dtype).normal_()
    sizes = {"num_heads": heads, "num_kv_heads": kv_heads, "head_dim": head_dim}

    def plan():
        return ops.plan_attention(
            table, start, lens, lens, page_size=PAGE_SIZE, max_query_tokens=1, **sizes
        )

    made, out = plan(), torch.empty_like(q)
    calls = [
        lambda k=k, v=v: ops.paged_attention(
            q, k, v, table, start, lens, lens, head_dim**-0.5, plan=made, out=out
        )
        for k, v in caches
    ]
    ours, planning = graph_microseconds(calls * 4), graph_microseconds([plan] * 20)
    theirs = None
    if with_torch:
        dense = caches.view(rounds, 2, batch, context, kv_heads, head_dim).transpose(3, 4)
        query = q[:, :, None]
        theirs = graph_microseconds(
            [
                lambda k=k, v=v: scaled_dot_product_attention(query, k, v, enable_gqa=True)
                for k, v in dense
            ]
        )
    return ours, planning, theirs


def extend_case(tokens, context, heads, kv_heads, head_dim, dtype, invariant=False):
    """Microseconds of one layer for the last `tokens` positions of one request: ours, torch's."""
    pages, device = context // PAGE_SIZE, "cuda"
    q = torch.randn(tokens, heads, head_dim, device=device, dtype=dtype)
    table = torch.randperm(pages, device=device, dtype=torch.int32)[None]
    start = torch.tensor([0, tokens], device=device, dtype=torch.int32)
    lens = torch.tensor([context], device=device, dtype=torch.int32)
    end = torch.arange(context - tokens, context, device=device, dtype=torch.int32) + 1
    k, v = torch.randn(2, pages, PAGE_SIZE, kv_heads, head_dim, device=device, dtype=dtype)
    sizes = {"num_heads": heads, "num_kv_heads": kv_heads, "head_dim": head_dim}
    plan = ops.plan_attention(
        table, start, lens, end, page_size=PAGE_SIZE, batch_invariant=invariant, **sizes
    )
    out = torch.empty_like(q)
    call = lambda: ops.paged_attention(  # noqa: E731
        q, k, v, table, start, lens, end, head_dim**-0.5, plan=plan, out=out
    )
    dense = [t.view(1, context, kv_heads, head_dim).transpose(1, 2) for t in (k, v)]
    query = q.transpose(0, 1)[None]
    theirs = None
    if tokens == context and not invariant:
        theirs = graph_microseconds(
            [lambda: scaled_dot_product_attention(query, *dense, is_causal=True, enable_gqa=True)]
            * 4
        )
    return graph_microseconds([call] * 4), theirs


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--only", default="", help="part of the names of the work to do")
    parser.add_argument("--no-torch", action="store_true")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype)
    torch.manual_seed(0)
    limit = read_gigabytes_per_second() * 1e3  # bytes per microsecond
    print(f"{torch.cuda.get_device_name()}, {arguments.dtype}, read {limit / 1e6:.2f} TB/s")
    print(f"{'work':28} {'us':>9} {'TB/s':>6} {'share':>6} {'plan us':>8} {'torch us':>9}")
    rows = []
    for model, shape in MODELS.items():
        heads, kv_heads, head_dim = shape
        for context in CONTEXTS:
            for batch in BATCHES:
                name = f"{model} decode {batch} x {context}"
                read = 2 * batch * context * kv_heads * head_dim * dtype.itemsize
                if arguments.only not in name or 2 * read > MOST_BYTES:
                    continue
                own, plan, other = decode_case(
                    batch, context, *shape, dtype, not arguments.no_torch and read < 4 << 30
                )
                rows.append({"work": name, "us": own, "share": read / own / limit})
                print(
                    f"{name:28} {own:9.2f} {read / own / 1e6:6.2f} "
                    f"{read / own / limit:6.1%} {plan:8.2f} "
                    f"{other if other else float('nan'):9.2f}",
                    flush=True,
                )
        for batch, context, tail in ((64, 4096, 256), (256, 1280, 256)):
            name = f"{model} shared {batch} x {context - tail} + {tail}"
            if arguments.only not in name:
                continue
            own, plan, _ = decode_case(batch, context, *shape, dtype, False, context - tail)
            rows.append({"work": name, "us": own})
            print(f"{name:28} {own:9.2f} {'':13} {plan:8.2f}", flush=True)
        for tokens, context in ((32, 8192), (512, 8192), (2048, 2048), (8192, 8192)):
            name = f"{model} extend {tokens} of {context}"
            if arguments.only not in name:
                continue
            own, other = extend_case(tokens, context, *shape, dtype)
            same, _ = extend_case(tokens, context, *shape, dtype, True)
            seen = sum(range(context - tokens + 1, context + 1))
            rate, same_rate = (4 * seen * heads * head_dim / t / 1e6 for t in (own, same))
            rows.append({"work": name, "us": own, "tflops": rate, "same_tflops": same_rate})
            print(
                f"{name:28} {own:9.2f} {rate:6.0f} TFLOP/s, batch-invariant {same_rate:.0f}"
                f"{'':9} {other if other else float('nan'):9.2f}",
                flush=True,
            )
    if arguments.json:
        arguments.json.write_text(json.dumps({"read": limit * 1e6, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
