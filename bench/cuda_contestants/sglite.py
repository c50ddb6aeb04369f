"""This library, through its public interface."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from statistics import median
from unittest.mock import patch

import torch

from bench.cuda_contestants.serve import serve
from bench.cuda_trace import describe_steps, recorded_trace
from bench.cuda_workloads import Decode, Prefill
from sglite import LLM, SamplingParams, __version__
from sglite.models import from_checkpoint

_NOT_COUNTED = 4  # tokens at the start, until every request decodes


class Sglite:
    """See `bench.cuda_contestants.serve.Contestant`.

    Args:
        folder, device, decodes, prefill: the checkpoint, and what to measure.
        arguments: of `LLM`, beside the model and the device.
    """

    def __init__(
        self,
        folder: Path,
        device: str,
        decodes: list[Decode],
        prefill: Prefill,
        arguments: dict | None = None,
    ):
        self.device, self.decodes, self.prefill = device, decodes, prefill
        if device == "cuda":
            torch.empty(1, device="cuda")  # the GPU's context is torch's, not ours
        arguments = dict(arguments or {})
        if device == "cpu":  # a trial; on a GPU the default belongs to what is measured
            arguments["kv_cache_tokens"] = 16_384
        start = time.perf_counter()
        with self._weights_loaded_at() as loaded:
            self.llm = LLM(folder, device=device, **arguments)
        made = time.perf_counter()
        self._generate([list(range(1, 17))], 8)
        self.startup = {
            "weights_seconds": loaded[0] - start,
            "after_weights_seconds": made - loaded[0],
            "first_tokens_seconds": time.perf_counter() - made,
        }
        self.vocab_size = len(self.llm.tokenizer)

    def prepare(self) -> dict:
        """Lets every batch size be captured once."""
        seconds = {}
        for decode in self.decodes:
            start = time.perf_counter()
            self._generate(decode.workload.prompts(0, self.vocab_size), decode.new_tokens)
            seconds[decode.name] = time.perf_counter() - start
        config = self.llm.config
        return {
            "name": f"sglite {__version__}",
            "settings": f"cuda_graphs={config.cuda_graphs}, "
            f"batch_invariant={config.batch_invariant}, quantization={config.quantization}",
            "first_call_seconds": seconds,
            "startup": self.startup,
        }

    def measure(self) -> dict:
        """Times between tokens as a caller sees them, prefill, and a trace of the GPU's work."""
        result = {"decode": {}, "prefill_seconds": [], "startup": self.startup}
        for decode in self.decodes:
            prompts = decode.workload.prompts(1, self.vocab_size)
            # With the prompts cached all requests decode from the second step on, side by side.
            self._generate(prompts, 1)
            result["decode"][decode.name] = {
                "step_seconds": self._streamed_steps(prompts, decode.new_tokens),
                "mean_step_seconds": self._mean_step(prompts, decode.new_tokens),
                "trace": self._trace(prompts, decode.new_tokens) if self.device == "cuda" else None,
            }
        for repeat in range(6):
            prompts = self.prefill.workload.prompts(repeat, self.vocab_size)
            start = time.perf_counter()
            self._generate(prompts, 1)
            result["prefill_seconds"].append(time.perf_counter() - start)
        del result["prefill_seconds"][0]
        return result

    def _generate(self, prompts: list[list[int]], new_tokens: int) -> None:
        self.llm.generate(prompts, _greedy(new_tokens), progress=False)

    def _streamed_steps(self, prompts: list[list[int]], new_tokens: int) -> list[float]:
        """Times between the tokens of the first request, all requests being streamed."""
        stamps = []
        for chunk in self.llm.stream(prompts, _greedy(new_tokens)):
            if chunk.index == 0:
                stamps += [time.perf_counter()] * len(chunk.token_ids)
        stamps = stamps[_NOT_COUNTED:]
        return [b - a for a, b in pairwise(stamps)]

    def _mean_step(self, prompts: list[list[int]], new_tokens: int) -> float:
        """What one more token costs `generate`: a long call less a short one, over the tokens."""
        long, short = new_tokens, new_tokens // 4
        seconds = {long: [], short: []}
        for _ in range(3):
            for tokens, times in seconds.items():
                start = time.perf_counter()
                self._generate(prompts, tokens)
                times.append(time.perf_counter() - start)
        return (median(seconds[long]) - median(seconds[short])) / (long - short)

    def _trace(self, prompts: list[list[int]], new_tokens: int) -> dict:
        with recorded_trace() as events:
            self._generate(prompts, min(32, new_tokens))
        return describe_steps(events)

    @contextmanager
    def _weights_loaded_at(self) -> Iterator[list[float]]:
        """Notes when the weights are on the GPU, which happens within `LLM(...)`."""
        load_model, stamps = from_checkpoint.load_model, []

        def noting(*arguments, **keywords):
            loaded = load_model(*arguments, **keywords)
            if self.device == "cuda":
                torch.cuda.synchronize()
            stamps.append(time.perf_counter())
            return loaded

        with patch.object(from_checkpoint, "load_model", noting):
            yield stamps


def _greedy(new_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_new_tokens=new_tokens, ignore_eos=True)


if __name__ == "__main__":
    serve(Sglite)
