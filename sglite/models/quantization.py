"""How the weights of a model are to be stored: what the caller asks for, what a checkpoint holds.

A checkpoint whose `config.json` has a `quantization_config` is read as it says (see `gptq`, `awq`
and `compressed_tensors` beside this file). Any other can be quantised while it is loaded.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from sglite.interface.errors import CheckpointError, ConfigError, UnsupportedModelError
from sglite.layers.embedding import Embedding, LMHead
from sglite.layers.weight import Weight, WeightModule
from sglite.models.awq import AwqFormat
from sglite.models.checkpoint import Checkpoint
from sglite.models.compressed_tensors import CompressedTensorsFormat
from sglite.models.gptq import GptqFormat
from sglite.models.quantized_format import QuantizedFormat
from sglite.ops import QuantizedLayout

#: What `LLM(quantization=)` can do to a checkpoint that is not quantised.
AT_LOAD = ("int8", "int4")
_FORMATS: dict[str, type[QuantizedFormat]] = {
    "awq": AwqFormat,
    "compressed-tensors": CompressedTensorsFormat,
    "gptq": GptqFormat,
}
_INT4_GROUPS = (128, 64, 32)


def resolve_quantization(
    asked: str | None, checkpoint: Checkpoint
) -> tuple[str | None, QuantizedFormat | None]:
    """The method's name (None: plain weights), and the format of a quantised checkpoint.

    Args:
        asked: what the caller says; None: nothing.
        checkpoint: whose config may hold a `quantization_config`.

    Raises:
        CheckpointError: the checkpoint's config has a value of a kind that it cannot have.
        ConfigError: what is asked for is unknown, or contradicts the checkpoint.
        UnsupportedModelError: the checkpoint's way is not implemented.
    """
    path = checkpoint.folder / "config.json"
    values = _quantization_config(checkpoint.config)
    if values is None:
        if asked is not None and asked not in AT_LOAD:
            known = ", ".join(repr(name) for name in AT_LOAD)
            hint = "; its config.json has no quantization_config" if asked in _FORMATS else ""
            raise ConfigError(
                f"quantization={asked!r}: a checkpoint in bfloat16, float16 or float32 can be "
                f"quantised while it is loaded, by {known}{hint}"
            )
        return asked, None
    method = values.get("quant_method")
    if not isinstance(method, str) or method not in _FORMATS:
        raise UnsupportedModelError(
            f"{path}: the weights are quantised ({repr(method or values)[:200]}), which is not "
            f"implemented; known: {', '.join(sorted(_FORMATS))}. Use such a checkpoint, or one in "
            f"bfloat16, float16 or float32"
        )
    if asked not in (None, method):
        raise ConfigError(
            f"quantization={asked!r} contradicts the checkpoint, whose weights are quantised "
            f"already ({method}): leave quantization= out, or use a checkpoint in bfloat16, "
            f"float16 or float32"
        )
    try:
        return method, _FORMATS[method].from_config(values)
    except CheckpointError as error:
        raise type(error)(f"{path}: {error}") from error


def quantize_at_load(model: nn.Module, method: str) -> None:
    """Has the matrices of a model stored quantised, embeddings and output head among them.

    Layers whose class says that rounding them does harm stay plain (`quantized_at_load`).

    Args:
        model: nothing has been written into it yet.
        method: "int8" (one scale for each row, an output of a linear layer) or "int4" (one for
            each 128 elements of a row, or 64 or 32 where that does not divide it). With "int4"
            embeddings and output head are int8: they suffer most, and halve the loss so.
    """
    for module in model.modules():
        if not isinstance(module, WeightModule) or not module.quantized_at_load:
            continue
        if module.matrix.layout is None:
            is_vocabulary = isinstance(module, Embedding | LMHead)
            own_method = "int8" if is_vocabulary else method
            module.matrix.quantize(layout_at_load(module.matrix, own_method))


def layout_at_load(matrix: Weight, method: str) -> QuantizedLayout:
    """How a matrix is stored by a method."""
    columns = matrix.shape[1]
    if method == "int8":
        return QuantizedLayout(bits=8, group_size=columns)
    group = next((size for size in _INT4_GROUPS if columns % size == 0), _INT4_GROUPS[-1])
    # 16 bits are enough for a scale, and float16 would underflow in a layer of small weights.
    return QuantizedLayout(bits=4, group_size=group, scale_dtype=torch.bfloat16)


def _quantization_config(values: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The dict of that name, of the text part where there are several; None: plain weights."""
    text = values.get("text_config")
    for part in (values, text if isinstance(text, Mapping) else {}):
        for key in ("quantization_config", "compression_config"):
            if found := part.get(key):
                return found if isinstance(found, Mapping) else {"quant_method": repr(found)}
    return None
