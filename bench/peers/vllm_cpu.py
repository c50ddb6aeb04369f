"""vLLM's CPU backend: `python -m bench.peers.vllm_cpu`.

Its best setting: compiled (not `enforce_eager`), prefix cache on, the engine in this process, which
saves the messages between two, and room for every prompt's tokens in one step.
"""

import json
import os
from pathlib import Path

# Read when vLLM is imported.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")  # GiB

import torch
import vllm
from vllm import LLM, SamplingParams

from bench.runner import serve

_LONGEST = 16_384  # tokens of one prompt and its answer


class VllmCpuEngine:
    """See `bench.runner.BenchEngine`."""

    def __init__(
        self, model: str, dtype: str, num_threads: int, kv_tokens: int, quantization: str | None
    ):
        if quantization:
            raise ValueError(f"quantization={quantization!r}: vLLM's CPU backend has no W8A16")
        torch.set_num_threads(num_threads)
        config = (Path(model) / "config.json").read_text()
        self.llm = LLM(
            model,
            dtype=dtype,
            skip_tokenizer_init=True,
            max_model_len=min(_LONGEST, json.loads(config)["max_position_embeddings"]),
            max_num_seqs=64,
            max_num_batched_tokens=4096,
            enable_prefix_caching=True,
        )
        self.about = {
            "version": vllm.__version__,
            "settings": "compiled, prefix cache, engine in process",
        }

    def generate(self, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
        """The new tokens of each prompt."""
        outputs = self.llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            SamplingParams(
                temperature=0, max_tokens=max_new_tokens, ignore_eos=True, detokenize=False
            ),
            use_tqdm=False,
        )
        return [list(output.outputs[0].token_ids) for output in outputs]


if __name__ == "__main__":
    serve(VllmCpuEngine)
