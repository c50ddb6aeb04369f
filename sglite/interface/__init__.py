"""What a caller passes and gets: settings, sampling parameters, prompts, outputs, errors.

The lowest floor: nothing here imports torch, transformers or anything else of sglite.
"""

from sglite.interface.config import EngineConfig, LLMOptions, check_keywords, refuse_foreign_option
from sglite.interface.errors import (
    CheckpointError,
    ConfigError,
    EngineClosedError,
    GenerationError,
    InvalidRequestError,
    OutOfMemoryError,
    RequestError,
    SGLiteError,
    UnsupportedModelError,
    suggest,
)
from sglite.interface.generation_defaults import GenerationDefaults
from sglite.interface.outputs import (
    CompletionOutput,
    FinishReason,
    Logprob,
    RequestOutput,
    StreamChunk,
    TokenLogprobs,
    Usage,
)
from sglite.interface.prompts import Prompt, normalize_prompts
from sglite.interface.sampling_params import SamplingParams, broadcast_sampling_params

__all__ = [
    "CheckpointError",
    "CompletionOutput",
    "ConfigError",
    "EngineClosedError",
    "EngineConfig",
    "FinishReason",
    "GenerationDefaults",
    "GenerationError",
    "InvalidRequestError",
    "LLMOptions",
    "Logprob",
    "OutOfMemoryError",
    "Prompt",
    "RequestError",
    "RequestOutput",
    "SGLiteError",
    "SamplingParams",
    "StreamChunk",
    "TokenLogprobs",
    "UnsupportedModelError",
    "Usage",
    "broadcast_sampling_params",
    "check_keywords",
    "normalize_prompts",
    "refuse_foreign_option",
    "suggest",
]
