"""GLM-4 of 2024: Llama whose pairs of channels lie side by side, and of which only a share rotates.

(GLM Team, 2024.) q, k and v have a bias if `attention_bias` says so, the last projection never;
checkpoints hold gate and up as one tensor.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from sglite.layers import RotaryEmbedding, rope_from_config
from sglite.models.config import DECODER_FIELDS
from sglite.models.llama import LlamaDecoderLayer, LlamaForCausalLM, LlamaModel, head_dim_of


class GlmDecoderLayer(LlamaDecoderLayer):
    """One layer."""

    @staticmethod
    def attention_options(config: Any, layer_id: int) -> dict[str, Any]:
        """Further arguments of `SelfAttention`."""
        return {"qkv_bias": config.attention_bias}

    @staticmethod
    def mlp_options(config: Any) -> dict[str, Any]:
        """Further arguments of `GatedMLP`."""
        return {}


class GlmModel(LlamaModel):
    """Embedding, layers and final norm."""

    layer_class = GlmDecoderLayer

    @staticmethod
    def rotary_embeddings(config: Any) -> Sequence[RotaryEmbedding]:
        """One for each layer."""
        rotary_emb = rope_from_config(
            config, head_dim_of(config), is_partial=True, is_neox_style=False
        )
        return [rotary_emb] * config.num_hidden_layers


class GlmForCausalLM(LlamaForCausalLM):
    """GLM with its output head; `config` is a `transformers.GlmConfig`."""

    model_class = GlmModel
    config_fields: ClassVar[Mapping[str, type]] = {
        **DECODER_FIELDS,
        "rope_parameters.partial_rotary_factor": float,
        "head_dim": int,
        "attention_bias": bool,
    }
    stacked_params: ClassVar[dict[str, tuple[str, ...]]] = {
        "qkv_proj": ("q_proj", "k_proj", "v_proj")
    }
