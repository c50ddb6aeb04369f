"""This library by Hugging Face's class, to be measured beside its own file for a model.

python bench/throughput.py --peer sglite_transformers --model qwen3-135m
"""

from typing import Any, ClassVar

from bench.peers.sglite import SgliteEngine
from bench.runner import serve


class SgliteTransformersEngine(SgliteEngine):
    """See `bench.runner.BenchEngine`."""

    options: ClassVar[dict[str, Any]] = {"architecture": "transformers"}


if __name__ == "__main__":
    serve(SgliteTransformersEngine)
