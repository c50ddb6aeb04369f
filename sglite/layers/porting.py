"""Types and arguments that model code written for SGLang names.

They are here so that such code imports and runs; what they stand for is refused by name when used.
"""

from typing import Any

from sglite.interface.errors import UnsupportedModelError


class QuantizationConfig:
    """How a checkpoint's weights are quantised. The type of every `quant_config` argument."""


class PPProxyTensors:
    """Hidden states handed from one pipeline stage to the next. The type of `pp_proxy_tensors`."""


def add_prefix(name: str, prefix: str) -> str:
    """The module path of a part: `prefix.name`, or `name` at the top."""
    return f"{prefix}.{name}" if prefix else name


def refuse_quantization(quant_config: Any, prefix: str) -> None:
    """Raises UnsupportedModelError unless `quant_config` is None."""
    if quant_config is not None:
        raise UnsupportedModelError(
            f"{prefix or 'this layer'}: quant_config={quant_config!r} is not supported: weights "
            f"are float32, bfloat16 or float16"
        )


def refuse_pipeline_and_embedding(pp_proxy_tensors: Any, get_embedding: bool) -> None:
    """Raises UnsupportedModelError if one of SGLang's two further forward arguments is used."""
    if pp_proxy_tensors is not None:
        raise UnsupportedModelError(
            "pp_proxy_tensors is not supported: a model runs whole, without pipeline stages"
        )
    if get_embedding:
        raise UnsupportedModelError(
            "get_embedding=True is not supported: models give next-token logits"
        )
