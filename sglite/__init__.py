"""sglite runs language models inside your own Python process.

from sglite import LLM

llm = LLM("demo")
print(llm.generate("What is 17 + 25?", temperature=0).text)
"""

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sglite.engine.invariance import InvarianceReport
    from sglite.interface.errors import (
        CheckpointError,
        ConfigError,
        EngineClosedError,
        GenerationError,
        InvalidRequestError,
        MissingPackageError,
        OutOfMemoryError,
        RequestError,
        SGLiteError,
        UnsupportedModelError,
    )
    from sglite.interface.outputs import CompletionOutput, Logprob, RequestOutput, StreamChunk
    from sglite.interface.sampling_params import SamplingParams
    from sglite.llm import LLM
    from sglite.models.registry import ModelRegistry, register
    from sglite.tools.compare import ComparisonReport, compare
    from sglite.tools.pack import pack
    from sglite.tools.show_config import show_config

__version__ = "0.1.0"

# Says nothing until the program that imports this sets up logging.
logging.getLogger(__name__).addHandler(logging.NullHandler())

# Public names and where they live. They are imported at first use, so that `import sglite` is quick
# and does not load torch.
_HOMES = {
    "LLM": "sglite.llm",
    "SamplingParams": "sglite.interface.sampling_params",
    "RequestOutput": "sglite.interface.outputs",
    "CompletionOutput": "sglite.interface.outputs",
    "InvarianceReport": "sglite.engine.invariance",
    "StreamChunk": "sglite.interface.outputs",
    "Logprob": "sglite.interface.outputs",
    "ModelRegistry": "sglite.models.registry",
    "register": "sglite.models.registry",
    "compare": "sglite.tools.compare",
    "ComparisonReport": "sglite.tools.compare",
    "pack": "sglite.tools.pack",
    "show_config": "sglite.tools.show_config",
    "SGLiteError": "sglite.interface.errors",
    "ConfigError": "sglite.interface.errors",
    "CheckpointError": "sglite.interface.errors",
    "UnsupportedModelError": "sglite.interface.errors",
    "InvalidRequestError": "sglite.interface.errors",
    "MissingPackageError": "sglite.interface.errors",
    "RequestError": "sglite.interface.errors",
    "GenerationError": "sglite.interface.errors",
    "EngineClosedError": "sglite.interface.errors",
    "OutOfMemoryError": "sglite.interface.errors",
}

__all__ = [
    "LLM",
    "CheckpointError",
    "ComparisonReport",
    "CompletionOutput",
    "ConfigError",
    "EngineClosedError",
    "GenerationError",
    "InvalidRequestError",
    "InvarianceReport",
    "Logprob",
    "MissingPackageError",
    "ModelRegistry",
    "OutOfMemoryError",
    "RequestError",
    "RequestOutput",
    "SGLiteError",
    "SamplingParams",
    "StreamChunk",
    "UnsupportedModelError",
    "compare",
    "pack",
    "register",
    "show_config",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'sglite' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
