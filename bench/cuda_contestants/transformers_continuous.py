"""Hugging Face transformers' continuous batching: `generate_batch` over a paged cache.

With SDPA, as its flash-attention packages have to be downloaded; CUDA graphs on.
"""

import inspect
from itertools import pairwise
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from bench.cuda_contestants.serve import serve
from bench.cuda_workloads import Decode, Prefill


class TransformersContinuous:
    """See `bench.cuda_contestants.serve.Contestant`."""

    def __init__(
        self,
        folder: Path,
        device: str,
        decodes: list[Decode],
        prefill: Prefill,
        memory_share: float = 0.25,
    ):
        self.device, self.decodes, self.memory_share = device, decodes, memory_share
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, attn_implementation="sdpa"
        )
        self.model = model.to(device).eval()

    def prepare(self) -> dict:
        """Runs a short batch, for what is set up at first use."""
        self._generate([[5, 6, 7, 8]] * 2, 4)
        return {
            "name": f"transformers {transformers.__version__} generate_batch",
            "settings": "paged cache, SDPA, CUDA graphs",
        }

    def measure(self) -> dict:
        """Times between tokens as the library records them itself, over all requests running."""
        result = {"decode": {}}
        for decode in self.decodes:
            prompts = decode.workload.prompts(0, self.model.config.vocab_size)
            outputs = self._generate(prompts, decode.new_tokens)
            # Only steps in which every request is past its prompt and none is done.
            begin = max(output.timestamps[0] for output in outputs)
            end = min(output.timestamps[-1] for output in outputs)
            stamps = [time for time in outputs[0].timestamps if begin < time <= end]
            result["decode"][decode.name] = {"step_seconds": [b - a for a, b in pairwise(stamps)]}
        return result

    def _generate(self, prompts: list[list[int]], new_tokens: int) -> list:
        outputs = self.model.generate_batch(
            prompts,
            generation_config=GenerationConfig(
                max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0
            ),
            continuous_batching_config=ContinuousBatchingConfig(**self._settings()),
            record_timestamps=True,
        )
        if len(outputs) != len(prompts):
            raise RuntimeError(f"{len(prompts)} prompts gave {len(outputs)} outputs")
        return list(outputs.values())

    def _settings(self) -> dict:
        settings = {
            "use_cuda_graph": self.device == "cuda",
            "allow_block_sharing": False,
            "max_memory_percent": self.memory_share,
        }
        # Newer versions would look for flash-attention's packages on the hub.
        if "auto_switch_to_flash" in inspect.signature(ContinuousBatchingConfig).parameters:
            settings["auto_switch_to_flash"] = False
        return settings


if __name__ == "__main__":
    serve(TransformersContinuous)
