"""Holds generation in bfloat16 to Hugging Face in float32: `python -m bench.cuda_accuracy`.

Small models of four families with random weights answer prompts of 1 to 4,000 tokens. At every
position of prompt and answer, the log-probabilities of the five most probable tokens are compared
with those that Hugging Face gives for the same tokens in float32 with eager attention; Hugging
Face's own bfloat16 shows what rounding alone does.

Required: the mean difference is at most 0.05, the largest at most twice Hugging Face's largest, for
the positions that prefill computes and for those that decode computes.
"""

import argparse
import dataclasses
import json
import random
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from bench.checkpoints import make_checkpoint
from bench.models import default_cache_folder
from bench.report import Rows, markdown_rows, print_rows
from sglite import LLM, SamplingParams

MOST_MEAN, MOST_OF_PEER = 0.05, 2.0
TOP = 5
LENGTHS = (1, 2, 17, 128, 700, 1500, 4000)
NEW_TOKENS = 48
VOCAB_SIZE = 8192
_COMMON = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "intermediate_size": 2816,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}
#: `config.json` of each family: grouped heads of 64 and 128, a window shorter than the prompts,
#: biases, norms of queries and keys, tied embeddings, scaled RoPE.
FAMILIES = {
    "llama": {
        **_COMMON,
        "model_type": "llama",
        "head_dim": 64,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 1024,
        },
    },
    "mistral": {**_COMMON, "model_type": "mistral", "sliding_window": 600},
    "qwen2": {
        **_COMMON,
        "model_type": "qwen2",
        "hidden_size": 896,
        "head_dim": 64,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "qwen3": {**_COMMON, "model_type": "qwen3", "num_hidden_layers": 8},
}


@dataclass(frozen=True)
class Variant:
    """A way of running: arguments of `LLM`, and what must have happened for it to count.

    Attributes:
        name: how it is called.
        arguments: of `LLM`.
        runs: how often all prompts are answered; the last time counts.
        cached: whether prompts must have been read from the prefix cache.
        preempts: whether requests must have been preempted; there are more of them then, which
            fill the cache and outgrow it.
    """

    name: str
    arguments: dict
    runs: int = 1
    cached: bool = False
    preempts: bool = False


def variants(longest: int) -> tuple[Variant, ...]:
    """All ways of running, for prompts and answers that together have up to `longest` tokens."""
    roomy = {"kv_cache_tokens": 4 * longest}
    return (
        Variant("graphs", roomy),
        Variant("no graphs", {**roomy, "cuda_graphs": False}),
        Variant("cache hits", roomy, runs=2, cached=True),
        Variant("chunked prefill", {**roomy, "chunked_prefill_size": 300}),
        # Room for the longest request and little beside it.
        Variant("preemption", {"kv_cache_tokens": longest + 32}, preempts=True),
        Variant("batch invariant", {**roomy, "batch_invariant": True}),
    )


@dataclass
class Differences:
    """From float32, over many log-probabilities: of ours and of Hugging Face's bfloat16."""

    count: int = 0
    ours_sum: float = 0.0
    ours_max: float = 0.0
    peer_sum: float = 0.0
    peer_max: float = 0.0

    def add(self, ours: Tensor, peer: Tensor) -> None:
        """Takes absolute differences of the same tokens in."""
        if not ours.numel():
            return
        if not ours.isfinite().all():
            self.ours_max = float("inf")
        self.count += ours.numel()
        self.ours_sum += ours.sum().item()
        self.peer_sum += peer.sum().item()
        self.ours_max = max(self.ours_max, ours.max().item())
        self.peer_max = max(self.peer_max, peer.max().item())

    @property
    def ours_mean(self) -> float:
        return self.ours_sum / self.count

    @property
    def peer_mean(self) -> float:
        return self.peer_sum / self.count

    @property
    def is_close(self) -> bool:
        """Whether both requirements of the module's docstring hold."""
        return self.ours_mean <= MOST_MEAN and self.ours_max <= MOST_OF_PEER * self.peer_max


class Oracle:
    """Hugging Face in float32 and in bfloat16, for one checkpoint."""

    def __init__(self, folder: Path, device: str):
        self.device = device
        self.exact, self.rounded = (
            _hugging_face(folder, dtype, device) for dtype in (torch.float32, torch.bfloat16)
        )
        self._known: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}

    def logprobs(self, token_ids: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Of both, [len(token_ids), vocabulary], on the host; row i follows token i."""
        key = tuple(token_ids)
        if key not in self._known:
            ids = torch.tensor([key], device=self.device)
            with torch.inference_mode():
                self._known[key] = tuple(
                    model(ids, use_cache=False).logits[0].float().log_softmax(-1).cpu()
                    for model in (self.exact, self.rounded)
                )
        return self._known[key]


def _hugging_face(folder: Path, dtype: torch.dtype, device: str) -> nn.Module:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    return model.to(device).eval()


def draw_prompts(lengths: Sequence[int], vocab_size: int = VOCAB_SIZE) -> list[list[int]]:
    """Random ids; a longer prompt begins as the one before it, so that prefixes are shared."""
    source = random.Random(0)
    prompts: list[list[int]] = []
    for length in lengths:
        shared = prompts[-1] if prompts and len(prompts[-1]) < length else []
        prompts.append([*shared, *source.choices(range(1, vocab_size), k=length - len(shared))])
    return prompts


def compare(
    folder: Path,
    variant: Variant,
    oracle: Oracle,
    *,
    device: str = "cuda",
    lengths: Sequence[int] = LENGTHS,
    new_tokens: int = NEW_TOKENS,
) -> dict:
    """Runs one variant; gives {"prefill": Differences, "decode": Differences, and counts}.

    Raises:
        AssertionError: what the variant is about did not happen.
    """
    if variant.preempts:
        share = variant.arguments["kv_cache_tokens"] // 8
        lengths = [*lengths, *[share - 8] * 16]
    prompts = draw_prompts(lengths)
    prefill = SamplingParams(temperature=0, max_new_tokens=1, prompt_logprobs=TOP)
    decode = SamplingParams(temperature=0, max_new_tokens=new_tokens, ignore_eos=True, logprobs=TOP)
    with LLM(folder, dtype="bfloat16", device=device, **variant.arguments) as llm:
        for _ in range(variant.runs):
            answered = llm.generate(prompts, decode, progress=False)
        stats = llm.stats()
        scored = llm.generate(prompts, prefill, progress=False)
    cached = sum(output.usage.cached_tokens for output in answered)
    assert not variant.cached or cached >= sum(map(len, prompts)) - 16 * len(prompts), cached
    assert not variant.preempts or stats["preemptions"] > 0, stats
    result = {
        "prefill": Differences(),
        "decode": Differences(),
        "cached_tokens": cached,
        "preemptions": stats["preemptions"],
    }
    for prompt, output, score in zip(prompts, answered, scored, strict=True):
        truth = oracle.logprobs(prompt + output.token_ids[:-1])
        last = len(prompt) - 1
        # Entry i of the prompt's is about token i, which the row before it predicts.
        _add(result["prefill"], truth, 0, score.prompt_logprobs[1:])
        _add(result["prefill"], truth, last, output.logprobs[:1])
        _add(result["decode"], truth, last + 1, output.logprobs[1:])
    return result


def _add(differences: Differences, truth: tuple[Tensor, Tensor], first: int, entries: list) -> None:
    """Takes in the entries for rows `first`, `first + 1`, ... of the truth."""
    rows, ids, values = [], [], []
    for row, entry in enumerate(entries, start=first):
        for token_id, logprob in entry.items():
            rows.append(row)
            ids.append(token_id)
            values.append(logprob.logprob)
    if rows:
        exact, rounded = (table[rows, ids] for table in truth)
        differences.add((torch.tensor(values) - exact).abs(), (rounded - exact).abs())


def table(result: dict) -> Rows:
    """One row for each family, variant and phase."""
    cells = []
    for name, record in result["cases"].items():
        for phase in ("prefill", "decode"):
            found = Differences(**record[phase])
            figures = (found.ours_mean, found.peer_mean, found.ours_max, found.peer_max)
            cells.append(
                [
                    f"{name}, {phase}",
                    f"{found.count}",
                    *(f"{value:.4f}" for value in figures),
                    "yes" if found.is_close else "NO",
                ]
            )
    columns = ["model, variant, phase", "compared", "mean", "HF bf16", "largest", "HF bf16", "ok"]
    return Rows(f"Log-probabilities in bfloat16, {result['device']}", columns, cells)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--family", action="append", choices=FAMILIES)
    parser.add_argument("--variant", action="append", help="(default: all)")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--scale", type=int, default=1, help="divides lengths, for a trial")
    parser.add_argument("--cache-folder", type=Path, default=default_cache_folder())
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    options = parser.parse_args()
    lengths = sorted({max(1, length // options.scale) for length in LENGTHS})
    new_tokens = max(24, NEW_TOKENS // options.scale)
    result = {
        "command": shlex.join(["python", "-m", "bench.cuda_accuracy", *sys.argv[1:]]),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
        "lengths": lengths,
        "new_tokens": new_tokens,
        "cases": {},
    }
    for family in options.family or FAMILIES:
        folder = options.cache_folder / f"accuracy-{family}"
        if not folder.is_dir():
            make_checkpoint(FAMILIES[family], folder)
        oracle = Oracle(folder, options.device)
        for variant in variants(max(lengths) + new_tokens):
            if options.variant and variant.name not in options.variant:
                continue
            found = compare(
                folder,
                variant,
                oracle,
                device=options.device,
                lengths=lengths,
                new_tokens=new_tokens,
            )
            for phase in ("prefill", "decode"):
                found[phase] = dataclasses.asdict(found[phase])
            result["cases"][f"{family}, {variant.name}"] = found
    print_rows(table(result), Console(width=140))
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(result, indent=1) + "\n")
        lines = ["# Accuracy in bfloat16", "", f"`{result['command']}`, {result['date']}", ""]
        options.output.with_suffix(".md").write_text(
            "\n".join(lines + markdown_rows(table(result)))
        )
    cases = result["cases"].values()
    if not all(
        Differences(**case[phase]).is_close for case in cases for phase in ("prefill", "decode")
    ):
        raise SystemExit("a difference is too large")


if __name__ == "__main__":
    main()
