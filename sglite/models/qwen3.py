"""Qwen3: Llama with RMSNorm on every head of q and k, and windows as Qwen2 has them.

(Yang et al., 2025.) The width of a head is the config's own, apart from the hidden size.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from sglite.models.config import DECODER_FIELDS
from sglite.models.llama import LlamaDecoderLayer, LlamaForCausalLM, LlamaModel
from sglite.models.qwen2 import sliding_window_of


class Qwen3DecoderLayer(LlamaDecoderLayer):
    """One layer."""

    @staticmethod
    def attention_options(config: Any, layer_id: int) -> dict[str, Any]:
        """Further arguments of `SelfAttention`."""
        return {
            "qkv_bias": config.attention_bias,
            "output_bias": config.attention_bias,
            "qk_norm_eps": config.rms_norm_eps,
            "sliding_window": sliding_window_of(config, layer_id),
        }

    @staticmethod
    def mlp_options(config: Any) -> dict[str, Any]:
        """Further arguments of `GatedMLP`."""
        return {}


class Qwen3Model(LlamaModel):
    """Embedding, layers and final norm."""

    layer_class = Qwen3DecoderLayer


class Qwen3ForCausalLM(LlamaForCausalLM):
    """Qwen3 with its output head; `config` is a `transformers.Qwen3Config`."""

    model_class = Qwen3Model
    config_fields: ClassVar[Mapping[str, type]] = {
        **DECODER_FIELDS,
        "head_dim": int,
        "attention_bias": bool,
        "layer_types": list,
        "sliding_window": int,
    }
