"""Qwen3-MoE: Qwen3 with an MLP of many experts, none of them shared. (Yang et al., 2025.)

As Qwen2-MoE in which layers have experts; a sliding window in every layer if `sliding_window` is
set.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from sglite.layers import QuantizationConfig
from sglite.models.config import DECODER_FIELDS
from sglite.models.llama import LlamaDecoderLayer, LlamaForCausalLM, LlamaModel
from sglite.models.qwen2_moe import SPARSE_FIELDS, make_sparse_mlp


class Qwen3MoeDecoderLayer(LlamaDecoderLayer):
    """One layer."""

    @staticmethod
    def attention_options(config: Any, layer_id: int) -> dict[str, Any]:
        """Further arguments of `SelfAttention`."""
        return {
            "qkv_bias": config.attention_bias,
            "output_bias": config.attention_bias,
            "qk_norm_eps": config.rms_norm_eps,
            "sliding_window": config.sliding_window,
        }

    @classmethod
    def build_mlp(
        cls, config: Any, layer_id: int, quant_config: QuantizationConfig | None, prefix: str
    ) -> nn.Module:
        """The `mlp` of a layer."""
        return make_sparse_mlp(config, layer_id, config.num_local_experts, quant_config, prefix)


class Qwen3MoeModel(LlamaModel):
    """Embedding, layers and final norm."""

    layer_class = Qwen3MoeDecoderLayer


class Qwen3MoeForCausalLM(LlamaForCausalLM):
    """Qwen3-MoE with its output head; `config` is a `transformers.Qwen3MoeConfig`."""

    model_class = Qwen3MoeModel
    # Files that call the number of experts `num_experts` need the config class, which knows both.
    config_fields: ClassVar[Mapping[str, type]] = {
        **DECODER_FIELDS,
        **SPARSE_FIELDS,
        "head_dim": int,
        "attention_bias": bool,
        "use_sliding_window": bool,
        "sliding_window": int,
        "num_local_experts": int,
    }
