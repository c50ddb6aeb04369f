"""Hugging Face transformers: `generate` with a static cache, whose decode step it compiles.

Its best setting for decode on a GPU that needs no further package: SDPA attention, torch.compile
in the mode "reduce-overhead" (Inductor's kernels in CUDA graphs), one padded batch.
"""

import time
from itertools import pairwise
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, GenerationConfig, StoppingCriteria

from bench.cuda_contestants.serve import serve
from bench.cuda_workloads import Decode, Prefill


class StepClock(StoppingCriteria):
    """Marks the GPU's time after each token, and never stops."""

    def __init__(self, device: str):
        self.device = device
        self.marks = []

    def __call__(self, input_ids, scores, **unused):
        """Called by `generate` when a token has been chosen."""
        if self.device == "cuda":
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()
        else:
            self.marks.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def step_seconds(self) -> list[float]:
        """Times between tokens, the first ones left out."""
        if self.device != "cuda":
            return [b - a for a, b in pairwise(self.marks[4:])]
        torch.cuda.synchronize()
        pairs = pairwise(self.marks[4:])
        return [a.elapsed_time(b) / 1e3 for a, b in pairs]


class TransformersStatic:
    """See `bench.cuda_contestants.serve.Contestant`."""

    def __init__(self, folder: Path, device: str, decodes: list[Decode], prefill: Prefill):
        self.device, self.decodes, self.prefill = device, decodes, prefill
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, attn_implementation="sdpa"
        )
        self.model = model.to(device).eval()
        self.vocab_size = self.model.config.vocab_size

    def prepare(self) -> dict:
        """Compiles the decode step of each batch size."""
        seconds = {}
        for decode in self.decodes:
            start = time.perf_counter()
            self._decode(decode, repeat=0)
            seconds[decode.name] = time.perf_counter() - start
        return {
            "name": f"transformers {transformers.__version__} generate",
            "settings": "SDPA, static cache, compiled (reduce-overhead); prefill not compiled",
            "first_call_seconds": seconds,
        }

    def measure(self) -> dict:
        """The median of event times between tokens; prefill as one forward."""
        result = {"decode": {}, "prefill_seconds": []}
        for decode in self.decodes:
            self._decode(decode, repeat=1)  # CUDA graphs are recorded in the second call
            result["decode"][decode.name] = {"step_seconds": self._decode(decode, repeat=2)}
        for repeat in range(5):
            ids = self._ids(self.prefill.workload, repeat)
            start = time.perf_counter()
            with torch.inference_mode():
                logits = self.model(ids, use_cache=True, logits_to_keep=1).logits
            logits.argmax(-1).cpu()
            result["prefill_seconds"].append(time.perf_counter() - start)
        del result["prefill_seconds"][0]
        return result

    def _ids(self, workload, repeat: int) -> torch.Tensor:
        return torch.tensor(workload.prompts(repeat, self.vocab_size), device=self.device)

    @torch.inference_mode()
    def _decode(self, decode: Decode, repeat: int) -> list[float]:
        ids, clock = self._ids(decode.workload, repeat), StepClock(self.device)
        self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=GenerationConfig(
                max_new_tokens=decode.new_tokens,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
                cache_implementation="static",
            ),
            stopping_criteria=[clock],
        )
        return clock.step_seconds()


if __name__ == "__main__":
    serve(TransformersStatic)
