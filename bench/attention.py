"""Times paged attention beside torch's scaled_dot_product_attention, in turns in one process.

    python -m bench.attention [--dtype bfloat16] [--threads 2] [--repeat 15] [--cpu-time]

torch gets what suits it best: keys and values dense, one length for all requests. Ours are in
shuffled pages, the hardest case for memory, unless `--pages ordered`. Decodes go round over as many
caches as a model has layers, so that they read memory and not the processor's cache.

GB/s counts what must be read: pages that requests share, once. The shares are of what torch reads
in a row, and of what it multiplies in float32, both on this machine just before.
"""

import argparse
import statistics
import time

import torch
from torch.nn.functional import scaled_dot_product_attention

from bench.limits import product_gigaflops_per_second, read_gigabytes_per_second
from sglite import _C
from sglite.ops import paged_attention

PAGE_SIZE = 16
MODELS = {"llama-135m": (9, 3, 64), "qwen3-0.6b": (16, 8, 128)}
# name: (requests, new tokens of each, positions of each, of these in pages of all requests)
WORK = {
    "prefill 2048": (1, 2048, 2048, 0),
    "chunk 512 of 2048": (1, 512, 2048, 0),
    "decode 1 x 1024": (1, 1, 1024, 0),
    "decode 1 x 4096": (1, 1, 4096, 0),
    "decode 32 x 1024": (32, 1, 1024, 0),
    "decode 64 x 160": (64, 1, 160, 0),
    "decode 32 x (1024 shared + 32)": (32, 1, 1056, 1024),
}
CACHE_BYTES = 256 << 20  # what a round over all caches reads, well above the last-level cache


def make_calls(
    requests, tokens, positions, shared, heads, kv_heads, head_dim, dtype, shuffled=True
):
    """Two lists of calls, ours and torch's, one for each cache of the round."""
    pages = positions // PAGE_SIZE
    one = 2 * requests * positions * kv_heads * head_dim * dtype.itemsize
    rounds = max(1, min(30, CACHE_BYTES // one)) if tokens == 1 else 1
    q = torch.randn(requests * tokens, heads, head_dim).to(dtype)
    order = torch.randperm if shuffled else torch.arange
    table = order(requests * pages, dtype=torch.int32).view(requests, pages)
    table[:, : shared // PAGE_SIZE] = table[0, : shared // PAGE_SIZE].clone()
    start = torch.arange(0, requests * tokens + 1, tokens, dtype=torch.int32)
    lens = torch.full((requests,), positions, dtype=torch.int32)
    end = torch.arange(positions - tokens, positions, dtype=torch.int32).repeat(requests) + 1
    dense_q = q.view(requests, tokens, heads, head_dim).transpose(1, 2)
    mask = None
    if 1 < tokens < positions:
        mask = torch.arange(positions) < end[:, None]
    ours, theirs = [], []
    for _ in range(rounds):
        k_cache, v_cache = (
            torch.randn(requests * pages, PAGE_SIZE, kv_heads, head_dim).to(dtype) for _ in range(2)
        )
        k, v = (torch.randn(requests, kv_heads, positions, head_dim).to(dtype) for _ in range(2))
        ours.append(
            lambda k=k_cache, v=v_cache: paged_attention(
                q, k, v, table, start, lens, end, head_dim**-0.5
            )
        )
        theirs.append(
            lambda k=k, v=v: scaled_dot_product_attention(
                dense_q,
                k,
                v,
                attn_mask=mask,
                is_causal=tokens == positions,
                enable_gqa=heads != kv_heads,
            )
        )
    return ours, theirs


def seconds(calls, repeat, clock):
    """The median time of one call, each timing a round over all calls."""
    times = []
    for _ in range(repeat):
        begin = clock()
        for call in calls:
            call()
        times.append((clock() - begin) / len(calls))
    return statistics.median(times)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeat", type=int, default=5, help="timings of each turn")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument(
        "--cpu-time", action="store_true", help="time of the calling thread (with --threads 1)"
    )
    parser.add_argument("--pages", choices=["shuffled", "ordered"], default="shuffled")
    parser.add_argument("--only", default="", help="part of the names of the work to do")
    parser.add_argument("--no-torch", action="store_true")
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype)
    clock = time.thread_time if arguments.cpu_time else time.perf_counter
    torch.set_num_threads(arguments.threads)
    _C.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    bandwidth = read_gigabytes_per_second(clock=clock)
    peak = product_gigaflops_per_second(torch.float32, clock=clock)
    print(f"{arguments.dtype}, {arguments.threads} threads, path {_C.cpu_path()}, ", end="")
    print(f"streaming read {bandwidth:.1f} GB/s, float32 product {peak:.0f} GFLOP/s")
    print(
        f"{'model':12} {'work':30} {'ms':>9} {'GFLOP/s':>8} {'share':>6} {'GB/s':>6} {'share':>6} "
        f"{'torch ms':>9}  ratio"
    )
    for model, (heads, kv_heads, head_dim) in MODELS.items():
        for name, (requests, tokens, positions, shared) in WORK.items():
            if arguments.only not in f"{model} {name}":
                continue
            shuffled = arguments.pages == "shuffled"
            ours, theirs = make_calls(
                requests, tokens, positions, shared, heads, kv_heads, head_dim, dtype, shuffled
            )
            if arguments.no_torch:
                theirs = []
            for call in ours[:1] + theirs[:1]:
                call()
            turns = [
                [seconds(c, arguments.repeat, clock) if c else 0.0 for c in (ours, theirs)]
                for _ in range(arguments.turns)
            ]
            own, other = (statistics.median(column) for column in zip(*turns, strict=True))
            seen = requests * sum(range(positions - tokens + 1, positions + 1))
            flops = 4 * seen * heads * head_dim
            kept = requests * (positions - shared) + shared
            read = 2 * kept * kv_heads * head_dim * dtype.itemsize
            print(
                f"{model:12} {name:30} {own * 1e3:9.3f} {flops / own / 1e9:8.0f} "
                f"{flops / own / 1e9 / peak:6.0%} {read / own / 1e9:6.1f} "
                f"{read / own / 1e9 / bandwidth:6.0%} {other * 1e3:9.3f} {other / own:6.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
