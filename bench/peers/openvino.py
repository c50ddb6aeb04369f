"""OpenVINO GenAI, continuous batching: `python -m bench.peers.openvino`.

Its best setting on a CPU: prefix cache on, and a common prefix computed by a request of its own
before the others come, as requests that come together do not find each other's pages.
"""

import numpy as np
import openvino
import openvino_genai

from bench.runner import common_prefix, serve

_BLOCK = 32  # tokens of a page of its cache on a CPU


class OpenvinoEngine:
    """See `bench.runner.BenchEngine`."""

    def __init__(
        self, model: str, dtype: str, num_threads: int, kv_tokens: int, quantization: str | None
    ):
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.enable_prefix_caching = True
        scheduler.max_num_seqs = 64
        scheduler.max_num_batched_tokens = 4096
        scheduler.num_kv_blocks = kv_tokens // _BLOCK + 64  # its pages are twice as large as ours
        self.pipeline = openvino_genai.ContinuousBatchingPipeline(
            model, scheduler, "CPU", {"INFERENCE_NUM_THREADS": num_threads}
        )
        self.about = {
            "version": openvino_genai.__version__,
            "settings": f"{quantization or dtype} weights, continuous batching, prefix cache, a "
            "common prefix computed first",
        }

    def generate(self, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
        """The new tokens of each prompt."""
        shared = common_prefix(prompts)
        if len(prompts) > 1 and shared >= _BLOCK:
            self._run([prompts[0][:shared]], 1)
        return self._run(prompts, max_new_tokens)

    def _run(self, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
        config = openvino_genai.GenerationConfig(
            max_new_tokens=max_new_tokens, ignore_eos=True, do_sample=False
        )
        results = self.pipeline.generate(
            [openvino.Tensor(np.array([prompt], np.int64)) for prompt in prompts],
            [config] * len(prompts),
        )
        return [list(result.m_generation_ids[0]) for result in results]


if __name__ == "__main__":
    serve(OpenvinoEngine)
