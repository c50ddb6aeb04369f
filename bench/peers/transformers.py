"""Hugging Face transformers, `generate`: `python -m bench.peers.transformers`.

Its best setting on a CPU: the checkpoint's dtype, SDPA attention, all prompts as one batch padded
on the left, and a static cache, which took less time than the dynamic one in every workload.
"""

import torch
import transformers
from transformers import AutoModelForCausalLM, GenerationConfig

from bench.runner import serve


class TransformersEngine:
    """See `bench.runner.BenchEngine`."""

    def __init__(
        self, model: str, dtype: str, num_threads: int, kv_tokens: int, quantization: str | None
    ):
        if quantization:
            raise ValueError(f"quantization={quantization!r}: transformers has none for a CPU")
        torch.set_num_threads(num_threads)
        self.model = AutoModelForCausalLM.from_pretrained(
            model, dtype=dtype, attn_implementation="sdpa"
        ).eval()
        self.about = {
            "version": transformers.__version__,
            "settings": "SDPA, inference_mode, one left-padded batch, static cache",
        }

    @torch.inference_mode()
    def generate(self, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
        """The new tokens of each prompt."""
        width = max(map(len, prompts))
        padding = [width - len(prompt) for prompt in prompts]
        ids = torch.tensor([[0] * n + prompt for n, prompt in zip(padding, prompts, strict=True)])
        mask = torch.arange(width) >= torch.tensor(padding)[:, None]
        generated = self.model.generate(
            ids,
            attention_mask=mask.long(),
            generation_config=GenerationConfig(
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
                cache_implementation="static",
            ),
        )
        return generated[:, width:].tolist()


if __name__ == "__main__":
    serve(TransformersEngine)
