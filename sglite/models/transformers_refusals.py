"""What the path through Hugging Face's own classes refuses by name."""

import logging
import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from sglite.interface.errors import UnsupportedModelError

_log = logging.getLogger(__name__)

# Kinds of layers that configs name in `layer_types`, beside those that attend.
_STATEFUL_LAYERS = re.compile(r"linear|mamba|ssm|recurrent|rwkv|conv|hybrid|delta", re.IGNORECASE)
# Modules that carry a state from token to token, by their class's name.
_STATEFUL_MODULES = re.compile(
    r"Mamba|Rwkv|RWKV|SSM|Retention|LSTM|Rglru|RecurrentBlock|GatedDelta|DeltaNet|ShortConv|"
    r"LightningAttention|LinearAttention|KimiDelta"
)
_BATCH_DEPENDENT_ROPE = ("dynamic", "longrope")


def refuse_config(name: str, config: Any) -> None:
    """Refuses what a config says before any weight is read.

    Args:
        name: of the architecture.
        config: the Hugging Face config.

    Raises:
        UnsupportedModelError: naming what it is.
    """
    text = config.get_text_config()
    if getattr(config, "is_encoder_decoder", False) or getattr(text, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{name} is an encoder-decoder, which is not implemented: models that continue a text "
            f"(decoders) are"
        )
    kinds = getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None) or ()
    for kind in kinds:
        if isinstance(kind, str) and _STATEFUL_LAYERS.search(kind):
            raise UnsupportedModelError(
                f"{name} has layers of the kind {kind!r}, which carry a state from token to token "
                f"(state-space, linear attention, convolution): the KV cache cannot hold it"
            )
        if isinstance(kind, str) and "chunked" in kind:
            raise UnsupportedModelError(
                f"{name} has layers of the kind {kind!r}: attention in chunks is not implemented"
            )


def refuse_modules(name: str, model: nn.Module) -> None:
    """Refuses layers that keep a state outside the KV cache, by their classes' names.

    Args:
        name: of the architecture.
        model: the Hugging Face model.

    Raises:
        UnsupportedModelError: naming the module.
    """
    for path, module in model.named_modules():
        kind = type(module).__name__
        is_leaf_state = _STATEFUL_MODULES.search(kind) and not isinstance(module, nn.ModuleList)
        if is_leaf_state and module is not model and _is_layer(path):
            raise UnsupportedModelError(
                f"{name} has state-space, linear-attention or convolution layers: {path} ({kind}) "
                f"carries a state from token to token, which the KV cache cannot hold"
            )


def refuse_rope(name: str, config: Any, context_length: int | None) -> int | None:
    """Refuses RoPE whose frequencies change with the longest sequence of a batch.

    Below its original length neither kind does, so that such a context is fine.

    Args:
        name: of the architecture.
        config: the Hugging Face config.
        context_length: what the caller asked for; None: all that is fine. Of "longrope" that is a
            small part of what the model was made for, so that it must be asked for.

    Returns:
        The longest context that is fine; None where RoPE sets no limit.

    Raises:
        UnsupportedModelError: the context goes beyond it; the message says what to pass.
    """
    text = config.get_text_config()
    for rope in _rope_parameters(text):
        kind = rope.get("rope_type", rope.get("type"))
        if kind not in _BATCH_DEPENDENT_ROPE:
            continue
        original = (
            rope.get("original_max_position_embeddings")
            or getattr(text, "original_max_position_embeddings", None)
            or getattr(text, "max_position_embeddings", None)
        )
        if context_length is None and original is not None and kind == "dynamic":
            _log.info("%s: 'dynamic' RoPE, which is plain up to a context of %d", name, original)
            return original
        if context_length is None or original is None or context_length > original:
            raise UnsupportedModelError(
                f"{name} has {kind!r} RoPE, whose frequencies change with the longest sequence of "
                f"a batch once that is beyond {original} positions: pass context_length={original} "
                f"or less, where they stay as they are"
            )
        return original
    return None


def _rope_parameters(config: Any) -> list[Mapping[str, Any]]:
    """The RoPE settings of a config; of every kind of layer, where they differ."""
    for name in ("rope_parameters", "rope_scaling"):
        given = getattr(config, name, None)
        if isinstance(given, Mapping):
            nested = [part for part in given.values() if isinstance(part, Mapping)]
            return nested or [given]
    return []


def _is_layer(path: str) -> bool:
    """Whether a module lies within a numbered layer."""
    return any(part.isdecimal() for part in path.split("."))
