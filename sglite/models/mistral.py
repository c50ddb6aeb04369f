"""Mistral: Llama with a sliding window in every layer, and never a bias. (Jiang et al., 2023.)"""

from collections.abc import Mapping
from typing import Any, ClassVar

from sglite.models.config import DECODER_FIELDS
from sglite.models.llama import LlamaDecoderLayer, LlamaForCausalLM, LlamaModel


class MistralDecoderLayer(LlamaDecoderLayer):
    """One layer."""

    @staticmethod
    def attention_options(config: Any, layer_id: int) -> dict[str, Any]:
        """Further arguments of `SelfAttention`."""
        return {"sliding_window": config.sliding_window}

    @staticmethod
    def mlp_options(config: Any) -> dict[str, Any]:
        """Further arguments of `GatedMLP`."""
        return {}


class MistralModel(LlamaModel):
    """Embedding, layers and final norm."""

    layer_class = MistralDecoderLayer


class MistralForCausalLM(LlamaForCausalLM):
    """Mistral with its output head; `config` is a `transformers.MistralConfig`."""

    model_class = MistralModel
    config_fields: ClassVar[Mapping[str, type]] = {
        **DECODER_FIELDS,
        "head_dim": int,
        "sliding_window": int,
    }
