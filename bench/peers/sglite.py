"""This library: `python -m bench.peers.sglite`."""

from typing import Any, ClassVar

from bench.runner import serve
from sglite import LLM, __version__


class SgliteEngine:
    """See `bench.runner.BenchEngine`.

    Attributes:
        options: further arguments of `LLM`.
    """

    options: ClassVar[dict[str, Any]] = {}

    def __init__(
        self, model: str, dtype: str, num_threads: int, kv_tokens: int, quantization: str | None
    ):
        self.llm = LLM(
            model,
            dtype=dtype,
            quantization=quantization,
            device="cpu",
            num_threads=num_threads,
            kv_cache_tokens=kv_tokens,
            **self.options,
        )
        settings = ", ".join(f"{name}={value}" for name, value in self.options.items())
        self.about = {"version": __version__, "settings": settings or "defaults"}

    def generate(self, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
        """The new tokens of each prompt."""
        outputs = self.llm.generate(
            prompts, max_new_tokens=max_new_tokens, temperature=0, ignore_eos=True, progress=False
        )
        return [output.token_ids for output in outputs]


if __name__ == "__main__":
    serve(SgliteEngine)
