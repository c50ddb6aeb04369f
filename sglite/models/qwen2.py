"""Qwen2 and 2.5: Llama with a bias on q, k and v, and a sliding window in some layers if asked for.

(Yang et al., 2024.) The layers with a window are those that `layer_types` calls
"sliding_attention"; without such a list, those from `max_window_layers` on, if
`use_sliding_window` is true.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from sglite.interface.errors import UnsupportedModelError
from sglite.models.config import DECODER_FIELDS
from sglite.models.llama import LlamaDecoderLayer, LlamaForCausalLM, LlamaModel


class Qwen2DecoderLayer(LlamaDecoderLayer):
    """One layer."""

    @staticmethod
    def attention_options(config: Any, layer_id: int) -> dict[str, Any]:
        """Further arguments of `SelfAttention`."""
        return {"qkv_bias": True, "sliding_window": sliding_window_of(config, layer_id)}

    @staticmethod
    def mlp_options(config: Any) -> dict[str, Any]:
        """Further arguments of `GatedMLP`."""
        return {}


class Qwen2Model(LlamaModel):
    """Embedding, layers and final norm."""

    layer_class = Qwen2DecoderLayer


class Qwen2ForCausalLM(LlamaForCausalLM):
    """Qwen2 with its output head; `config` is a `transformers.Qwen2Config`."""

    model_class = Qwen2Model
    config_fields: ClassVar[Mapping[str, type]] = {
        **DECODER_FIELDS,
        "layer_types": list,
        "sliding_window": int,
    }


def sliding_window_of(config: Any, layer_id: int) -> int | None:
    """The window of one layer by the config's `layer_types`; None: it sees everything."""
    kind = config.layer_types[layer_id]
    if kind == "full_attention":
        return None
    if kind != "sliding_attention":
        raise UnsupportedModelError(
            f"layer_types[{layer_id}]={kind!r} is not implemented; known: full_attention, "
            f"sliding_attention"
        )
    return config.sliding_window
