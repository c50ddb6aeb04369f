"""Measures single ops beside torch and FlashInfer: `python -m bench.cuda_ops --output FILE.json`.

    prefill attention   causal, one request of 8k tokens, 32 / 8 heads of 128; TFLOP/s
    decode attention    64 requests of 4k tokens, 32 / 8 heads of 128, pages of 16; us and TB/s
    sampling            top-k 50 and top-p 0.9, 64 rows of 131,072 logits; us

All on random bfloat16 (logits: float32) data, with events, medians; inputs rotate over more than
the L2 cache holds. torch's attention gets dense keys and values, what suits it best; FlashInfer the
same pages as ours. Plans are made beforehand, as a step makes them once for all its layers.

FlashInfer takes part where it is installed: version 0.7.2 is a wheel of 62 MB that compiles what it
runs with nvcc at first use. There are no compiled kernels of that version on PyPI
(`flashinfer-cubin` ends at 0.6.13 and holds Blackwell's; `flashinfer-jit-cache` is not there).
Where nothing can be downloaded its Python files, csrc, CUTLASS and CCCL headers are enough, 14 MB
compressed, with `FLASHINFER_CUDA_ARCH_LIST=9.0a` and curand's headers on `CPATH`.
"""

import argparse
import importlib.util
import json
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import cycle
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from bench.cuda_limits import cuda_limits, seconds_of_runs
from bench.cuda_machine import cuda_machine
from bench.report import Rows, markdown_rows, print_rows

HEADS, KV_HEADS, HEAD_DIM, PAGE_SIZE = 32, 8, 128, 16
PREFILL_TOKENS = 8192
BATCH, POSITIONS = 64, 4096
VOCAB, TOP_K, TOP_P = 131072, 50, 0.9
_SCALE = HEAD_DIM**-0.5
PLANNED = {
    "page_size": PAGE_SIZE,
    "num_heads": HEADS,
    "num_kv_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
}


@dataclass(frozen=True)
class Contest:
    """One op at one shape: what to count, and who runs it."""

    name: str
    operations: float = 0.0
    bytes_read: float = 0.0


PREFILL = Contest("prefill attention 8k", operations=2 * HEADS * HEAD_DIM * PREFILL_TOKENS**2)
DECODE = Contest(
    "decode attention 64 x 4k", bytes_read=2 * 2 * BATCH * POSITIONS * KV_HEADS * HEAD_DIM
)
SAMPLING = Contest("top-k, top-p 64 x 131k", bytes_read=4 * BATCH * VOCAB)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def integers(values: list[int] | range) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device="cuda")


def rotating(run: Callable, inputs: list) -> Callable[[], object]:
    """Calls `run(*one)` on one of the inputs after the other."""
    supply = cycle(inputs)
    return lambda: run(*next(supply))


def prefill_runs(ours: bool, flashinfer: bool) -> dict[str, Callable]:
    """Attention of one request whose keys and values are all new."""
    q = random(PREFILL_TOKENS, HEADS, HEAD_DIM)
    k, v = (random(PREFILL_TOKENS, KV_HEADS, HEAD_DIM) for _ in range(2))
    runs = {}
    if ours:
        from sglite import ops

        pages = PREFILL_TOKENS // PAGE_SIZE
        table = torch.randperm(pages, device="cuda").int()
        caches = [torch.empty(pages, PAGE_SIZE, KV_HEADS, HEAD_DIM, device="cuda").bfloat16()] * 2
        for index, dense in enumerate((k, v)):
            caches[index] = torch.empty_like(caches[index])
            caches[index][table.long()] = dense.view(pages, PAGE_SIZE, KV_HEADS, HEAD_DIM)
        start, lens = integers([0, PREFILL_TOKENS]), integers([PREFILL_TOKENS])
        end = integers(range(1, PREFILL_TOKENS + 1))
        rows = (table[None], start, lens, end)
        plan = ops.plan_attention(*rows, **PLANNED)
        runs["sglite"] = lambda: ops.paged_attention(q, *caches, *rows, _SCALE, plan=plan)
    dense = [x.transpose(0, 1)[None] for x in (q, k, v)]
    repeated = [x.repeat_interleave(HEADS // KV_HEADS, 1) for x in dense[1:]]
    for name, backend, arguments in (
        ("torch SDPA, flash", SDPBackend.FLASH_ATTENTION, dense),
        ("torch SDPA, cuDNN", SDPBackend.CUDNN_ATTENTION, dense),
        ("torch SDPA, flash, heads repeated", SDPBackend.FLASH_ATTENTION, [dense[0], *repeated]),
    ):
        runs[name] = torch_attention(backend, arguments, is_causal=True)
    if flashinfer:
        import flashinfer as other

        runs["FlashInfer, FA3"] = lambda: other.single_prefill_with_kv_cache(
            q, k, v, causal=True, backend="fa3"
        )
    return runs


def torch_attention(backend: SDPBackend, arguments: list[Tensor], is_causal: bool) -> Callable:
    def run():
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(*arguments, is_causal=is_causal, enable_gqa=True)

    return run


def decode_runs(ours: bool, flashinfer: bool) -> dict[str, Callable]:
    """Attention of one new token of each request over its pages."""
    pages = BATCH * POSITIONS // PAGE_SIZE
    q = random(BATCH, HEADS, HEAD_DIM)
    caches = [
        tuple(random(pages, PAGE_SIZE, KV_HEADS, HEAD_DIM) for _ in range(2)) for _ in range(3)
    ]
    table = torch.randperm(pages, device="cuda").int().view(BATCH, -1)
    runs = {}
    if ours:
        from sglite import ops

        start, lens = integers(range(BATCH + 1)), integers([POSITIONS] * BATCH)
        rows = (table, start, lens, lens)
        for name, invariant in (("sglite", False), ("sglite, batch invariant", True)):
            plan = ops.plan_attention(
                *rows, **PLANNED, max_query_tokens=1, batch_invariant=invariant
            )
            runs[name] = rotating(
                lambda k, v, plan=plan: ops.paged_attention(q, k, v, *rows, _SCALE, plan=plan),
                caches,
            )
    dense = [
        [x.view(BATCH, POSITIONS, KV_HEADS, HEAD_DIM).transpose(1, 2) for x in pair]
        for pair in caches
    ]
    for name, backend in (
        ("torch SDPA, flash", SDPBackend.FLASH_ATTENTION),
        ("torch SDPA, cuDNN", SDPBackend.CUDNN_ATTENTION),
    ):
        calls = [torch_attention(backend, [q[:, :, None], k, v], False) for k, v in dense]
        runs[name] = rotating(lambda call: call(), [(call,) for call in calls])
    if flashinfer:
        import flashinfer as other

        for name, tensor_cores in (
            ("FlashInfer, tensor cores", True),
            ("FlashInfer, CUDA cores", False),
        ):
            workspace = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
            wrapper = other.BatchDecodeWithPagedKVCacheWrapper(
                workspace, "NHD", use_tensor_cores=tensor_cores, backend="fa2"
            )
            wrapper.plan(
                integers(range(0, pages + 1, POSITIONS // PAGE_SIZE)),
                table.flatten(),
                integers([PAGE_SIZE] * BATCH),
                HEADS,
                KV_HEADS,
                HEAD_DIM,
                PAGE_SIZE,
                q_data_type=torch.bfloat16,
                kv_data_type=torch.bfloat16,
            )
            runs[name] = rotating(lambda k, v, w=wrapper: w.run(q, (k, v)), caches)
    return runs


def sampling_runs(ours: bool, flashinfer: bool) -> dict[str, Callable]:
    """Choosing one token of each row."""
    logits = [(3 * torch.randn(BATCH, VOCAB, device="cuda"),) for _ in range(4)]
    runs = {}
    if ours:
        from sglite import ops

        reals = torch.tensor([[1.0, TOP_P, 0.0, 1.0, 0.0, 0.0]] * BATCH, device="cuda")
        numbers = torch.tensor([[TOP_K, seed, 0, 0] for seed in range(BATCH)], device="cuda")
        runs["sglite"] = rotating(lambda x: ops.sample(x, reals, numbers), logits)
    runs["torch, by sorting"] = rotating(sample_by_sorting, logits)
    if flashinfer:
        import flashinfer as other

        runs["FlashInfer"] = rotating(
            lambda x: other.sampling.top_k_top_p_sampling_from_probs(
                x.softmax(-1), TOP_K, TOP_P, filter_apply_order="joint"
            ),
            logits,
        )
    return runs


def sample_by_sorting(logits: Tensor) -> Tensor:
    ordered, ids = logits.sort(descending=True)
    ordered[:, TOP_K:] = -torch.inf
    probabilities = ordered.softmax(-1)
    probabilities[probabilities.cumsum(-1) - probabilities > TOP_P] = 0
    return ids.gather(1, probabilities.multinomial(1))


def measure(options: argparse.Namespace) -> dict:
    """Seconds of each run, or why it failed."""
    flashinfer = importlib.util.find_spec("flashinfer") is not None
    result = {"machine": cuda_machine(), "limits": cuda_limits(), "ops": {}}
    for contest, make in (
        (PREFILL, prefill_runs),
        (DECODE, decode_runs),
        (SAMPLING, sampling_runs),
    ):
        record = result["ops"][contest.name] = {
            "operations": contest.operations,
            "bytes": contest.bytes_read,
            "seconds": {},
        }
        for name, run in make(not options.peers_only, flashinfer).items():
            try:
                record["seconds"][name] = median(graph_or_plain_seconds(run))
            except Exception as error:  # a peer's refusal is a result as well
                record["seconds"][name] = f"{type(error).__name__}: {str(error)[:200]}"
        torch.cuda.empty_cache()
    return result


def graph_or_plain_seconds(run: Callable) -> list[float]:
    """Times of single runs; of four in a CUDA graph where they can be captured.

    Without a graph a short op is measured by what its launch takes.
    """
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for _ in range(4):
                run()
    except RuntimeError:
        torch.cuda.synchronize()
        return seconds_of_runs(run, 30)
    return [seconds / 4 for seconds in seconds_of_runs(graph.replay, 30)]


def table(result: dict) -> Rows:
    """For each op and contestant its time, and its rate as a share of the machine's."""
    limits, cells = result["limits"], []
    for op, record in result["ops"].items():
        for who, seconds in record["seconds"].items():
            name = f"{op}: {who}"
            if isinstance(seconds, str):
                cells.append([name, "failed", seconds.replace("\n", " "), ""])
                continue
            if record["operations"]:
                rate, unit = record["operations"] / seconds / 1e12, "TFLOP/s"
                share = rate / limits["matmul_teraflops_per_second"]
            else:
                rate, unit = record["bytes"] / seconds / 1e12, "TB/s"
                share = rate * 1e3 / limits["read_gigabytes_per_second"]
            cells.append([name, f"{seconds * 1e6:.1f}", f"{rate:.2f} {unit}", f"{share:.0%}"])
    return Rows(
        f"Ops on {result['machine']['gpu']}", ["op: who", "us", "rate", "of the limit"], cells
    )


def machine_table(result: dict) -> Rows:
    """Whose figures these are."""
    facts = {**result["machine"], **result["limits"]}
    cells = [
        [name.replace("_", " "), f"{value:.4g}" if isinstance(value, float) else f"{value}"]
        for name, value in facts.items()
    ]
    return Rows("Machine", ["what", "figure"], cells)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peers-only", action="store_true", help="without this library")
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    options = parser.parse_args()
    torch.manual_seed(0)
    result = {
        "command": shlex.join(["python", "-m", "bench.cuda_ops", *sys.argv[1:]]),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        **measure(options),
    }
    print_rows(table(result), Console(width=140))
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(result, indent=1) + "\n")
        lines = [
            "# Ops beside torch and FlashInfer",
            "",
            f"`{result['command']}`, {result['date']}",
        ]
        lines += ["", *markdown_rows(table(result)), *markdown_rows(machine_table(result))]
        options.output.with_suffix(".md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
