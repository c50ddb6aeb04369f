"""One batch of one model: is it right, or how fast is it?

`python bench/one_batch.py --correct --model PATH` prints the logits of prefill and the greedy text
of some prompts beside those of Hugging Face transformers in float32, and fails where they are not
near enough. Without `--correct` it measures one batch: the latency of prefill, the latency of a
decode step, and the throughput.
"""

import argparse
import statistics
import sys
from dataclasses import dataclass

import torch

from sglite import LLM
from sglite.models.checkpoint import resolve_checkpoint
from sglite.tools.compare.layers import Expectation
from sglite.tools.compare.measuring import measure
from sglite.tools.compare.ours import Text, forced_logits, generate
from sglite.tools.compare.reference import load_reference
from sglite.tools.compare.texts import compare_texts, excuse_experts

_PROMPTS = (
    "The capital of France is",
    "The capital of the United Kingdom is",
    "Today is a sunny day and I like",
)
_SHOWN = 5  # logits of a row


@dataclass(frozen=True)
class Timing:
    """One run of a batch.

    Attributes:
        prefill: seconds until every prompt has its first token.
        decode: seconds for each step after that.
        throughput: tokens of prompts and completions per second, over all.
    """

    prefill: float
    decode: float
    throughput: float


def correct(model: str, new_tokens: int, **options) -> str:
    """Prints logits and texts beside the reference's; what is wrong, or "" where nothing is."""
    checkpoint = resolve_checkpoint(model)
    with LLM(model, kv_cache_tokens=4096, **options) as llm:
        prompts = [list(llm.tokenizer.encode(prompt)) for prompt in _PROMPTS]
        following, error = generate(llm, prompts, new_tokens)
        if error:
            return error
        texts = [Text(*pair) for pair in zip(prompts, following, strict=True)]
        device = torch.device(llm.config.device)
        reference = load_reference(checkpoint, torch.float32, device)
        expected = Expectation.of_all(reference, None, texts)
        own = None
        if llm.config.dtype != "float32":
            low = load_reference(checkpoint, getattr(torch, llm.config.dtype), device)
            own = Expectation.of_all(low, None, texts, expected)
        measurement = measure(llm, None, texts, expected, own)
        written = compare_texts(texts, expected, reference, measurement.tie, llm.tokenizer)
        if measurement.guide is not None:
            written = excuse_experts(llm, texts, written, measurement.tie)
        for text, ours, theirs, both in zip(
            texts, forced_logits(llm, texts), expected, written, strict=True
        ):
            last = len(text.prompt) - 1
            print(f"prompt: {llm.tokenizer.decode(text.prompt)!r}")
            for name, rows in (("sglite", ours), ("reference", theirs.logits)):
                print(f"  prefill logits, {name:10} {rows[last, :_SHOWN].tolist()}")
            print(f"  text, sglite     {both.our_text!r}")
            print(f"  text, reference  {both.their_text!r} (ROUGE-L {both.rouge_l:.3f})")
    failures = [measurement.failure]
    failures += [
        f"the text after {t.prompt_tokens} tokens differs" for t in written if not t.passed
    ]
    return next(filter(None, failures), "")


def timings(
    model: str, batch_size: int, input_len: int, output_len: int, repeats: int, **options
) -> list[Timing]:
    """Runs one batch some times, after a run that does not count."""
    with LLM(
        model,
        prefix_cache=False,
        max_running_requests=batch_size,
        chunked_prefill_size=batch_size * input_len,
        **options,
    ) as llm:
        draw = torch.Generator().manual_seed(0)
        # Ids of a small vocabulary are in every larger one.
        prompts = torch.randint(2, 200, (batch_size, input_len), generator=draw).tolist()
        return [_timed(llm, prompts, output_len) for _ in range(repeats + 1)][1:]


def _timed(llm: LLM, prompts: list[list[int]], output_len: int) -> Timing:
    outputs = llm.generate(
        prompts, temperature=0, max_new_tokens=output_len, ignore_eos=True, progress=False
    )
    prefill = max(output.usage.time_to_first_token for output in outputs)
    total = max(output.usage.latency for output in outputs)
    tokens = len(prompts) * (len(prompts[0]) + output_len)
    return Timing(prefill, (total - prefill) / max(1, output_len - 1), tokens / total)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help='a folder, a hub id or "demo"')
    parser.add_argument("--correct", action="store_true", help="compare with the reference")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--architecture")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    asked = parser.parse_args()
    options = {"dtype": asked.dtype, "architecture": asked.architecture}
    if asked.correct:
        failure = correct(asked.model, asked.output_len, **options)
        print(f"failed: {failure}" if failure else "passed")
        return 1 if failure else 0
    runs = timings(
        asked.model, asked.batch_size, asked.input_len, asked.output_len, asked.repeats, **options
    )
    print(f"{asked.model}: batch {asked.batch_size}, {asked.input_len} in, {asked.output_len} out")
    print(f"prefill     {1e3 * statistics.median(run.prefill for run in runs):10.2f} ms")
    print(f"decode step {1e3 * statistics.median(run.decode for run in runs):10.2f} ms")
    print(f"throughput  {statistics.median(run.throughput for run in runs):10.1f} tokens/s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
