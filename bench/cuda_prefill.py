"""Times prefill and extend attention on the GPU beside torch's scaled_dot_product_attention.

    python -m bench.cuda_prefill [--only 8k] [--no-torch]

Ours reads keys and values from shuffled pages of 16; torch gets them dense, and only the shapes
that it has a fast path for: one length for all requests, nothing cached. The rate counts the
products that the mask leaves, 4 * head_dim operations for each query head and visible key, and is
shown as a share of what a large bfloat16 matrix product reaches in the same run.
"""

import argparse
from dataclasses import dataclass
from statistics import median

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from sglite import ops

PAGE_SIZE = 16
TURNS, SECONDS_PER_TURN = 7, 0.01


@dataclass(frozen=True)
class Case:
    """Requests of `(cached, new)` tokens, all with the same heads."""

    name: str
    requests: tuple[tuple[int, int], ...]
    q_heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128

    def operations(self) -> int:
        """What the causal mask leaves of both products."""
        seen = sum(n * c + n * (n + 1) // 2 for c, n in self.requests)
        return 4 * seen * self.q_heads * self.head_dim


def cases() -> list[Case]:
    lengths = {"1k": 1024, "2k": 2048, "4k": 4096, "8k": 8192, "16k": 16384, "32k": 32768}
    listed = [Case(f"causal {name}", ((0, length),)) for name, length in lengths.items()]
    for head_dim in (64, 96, 256):
        listed += [
            Case(f"causal {name}", ((0, lengths[name]),), head_dim=head_dim)
            for name in ("2k", "8k", "32k")
        ]
    ragged = ((0, 3000), (1000, 517), (0, 77), (4000, 1200), (0, 2100), (250, 900), (0, 398))
    return [
        *listed,
        Case("8 x 1k", ((0, 1024),) * 8),
        Case("2k on 6k cached", ((6144, 2048),)),
        Case("512 on 32k cached", ((32256, 512),)),
        Case("ragged, 8192 tokens", ragged),
        Case("ragged, 8192 tokens", ragged, head_dim=64),
        Case("causal 8k, Qwen3-0.6B heads", ((0, 8192),), q_heads=16),
    ]


def make_ours(case: Case, dtype: torch.dtype):
    """A call of our op over shuffled pages, planned before as for all layers of a step."""
    tokens = sum(n for _, n in case.requests)
    lens = [c + n for c, n in case.requests]
    counts = [-(-length // PAGE_SIZE) for length in lens]
    pages = torch.randperm(sum(counts), dtype=torch.int32)
    table = torch.zeros(len(lens), max(counts), dtype=torch.int32)
    for row, (start, count) in enumerate(
        zip(torch.tensor([0, *counts]).cumsum(0).tolist()[:-1], counts, strict=True)
    ):
        table[row, :count] = pages[start : start + count]
    start = torch.tensor([0, *(n for _, n in case.requests)]).cumsum(0)
    end = torch.cat([torch.arange(c, c + n) + 1 for c, n in case.requests])
    batch = [t.int().cuda() for t in (table, start, torch.tensor(lens), end)]
    q = torch.randn(tokens, case.q_heads, case.head_dim, device="cuda", dtype=dtype)
    shape = (sum(counts), PAGE_SIZE, case.kv_heads, case.head_dim)
    caches = [torch.randn(shape, device="cuda", dtype=dtype) for _ in range(2)]
    plan = ops.plan_attention(
        *batch,
        page_size=PAGE_SIZE,
        num_heads=case.q_heads,
        num_kv_heads=case.kv_heads,
        head_dim=case.head_dim,
    )
    out = torch.empty_like(q)
    scale = case.head_dim**-0.5
    return lambda: ops.paged_attention(q, *caches, *batch, scale, plan=plan, out=out)


def make_torch(case: Case, dtype: torch.dtype, backend: SDPBackend):
    """The same work on dense keys and values; None where torch has no fast path for it."""
    if len(set(case.requests)) > 1 or case.requests[0][0]:
        return None
    batch, length = len(case.requests), case.requests[0][1]
    q, k, v = (
        torch.randn(batch, heads, length, case.head_dim, device="cuda", dtype=dtype)
        for heads in (case.q_heads, case.kv_heads, case.kv_heads)
    )

    def call():
        with sdpa_kernel(backend):
            scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    return call


def seconds(call) -> float:
    """The median over turns of the mean time of a call."""

    def turn(count: int) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(count):
            call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / count

    turn(2)
    count = max(1, int(SECONDS_PER_TURN / turn(2)))
    return median(turn(count) for _ in range(TURNS))


def matmul_rate(size: int = 8192) -> float:
    left, right = torch.randn(2, size, size, device="cuda", dtype=torch.bfloat16).unbind()
    return 2 * size**3 / seconds(lambda: left @ right)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="part of the names of the cases to run")
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--no-torch", action="store_true")
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype)
    torch.manual_seed(0)
    limit = matmul_rate()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {arguments.dtype}, ", end="")
    print(f"matrix product of 8192^3: {limit / 1e12:.0f} TFLOP/s")
    print("| work | heads | us | TFLOP/s | of the matrix product | torch flash | torch cudnn |")
    print("|---|---|---:|---:|---:|---:|---:|")
    for case in cases():
        if arguments.only not in case.name:
            continue
        own = seconds(make_ours(case, dtype))
        cells = [
            case.name,
            f"{case.q_heads}/{case.kv_heads} x {case.head_dim}",
            f"{own * 1e6:.1f}",
            f"{case.operations() / own / 1e12:.0f}",
            f"{case.operations() / own / limit:.0%}",
        ]
        for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
            call = None if arguments.no_torch else make_torch(case, dtype, backend)
            try:
                cells.append(f"{case.operations() / seconds(call) / 1e12:.0f}" if call else "")
            except RuntimeError:  # this torch has no such kernel for the shape
                cells.append("none")
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
