"""Qwen2-MoE: Qwen2 with an MLP of many experts, one of which every token uses. (Yang et al., 2024.)

The probabilities of a token's experts are divided by their sum if `norm_topk_prob` says so; the
shared expert has a gate of its own. Layers in `mlp_only_layers`, and all but each
`decoder_sparse_step`th, have an ordinary MLP.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from sglite.layers import QuantizationConfig, SparseMLP, add_prefix
from sglite.models.config import DECODER_FIELDS
from sglite.models.llama import LlamaDecoderLayer, LlamaForCausalLM, LlamaModel, make_mlp
from sglite.models.qwen2 import sliding_window_of


class Qwen2MoeDecoderLayer(LlamaDecoderLayer):
    """One layer."""

    @staticmethod
    def attention_options(config: Any, layer_id: int) -> dict[str, Any]:
        """Further arguments of `SelfAttention`."""
        return {
            "qkv_bias": config.qkv_bias,
            "sliding_window": sliding_window_of(config, layer_id),
        }

    @classmethod
    def build_mlp(
        cls, config: Any, layer_id: int, quant_config: QuantizationConfig | None, prefix: str
    ) -> nn.Module:
        """The `mlp` of a layer."""
        return make_sparse_mlp(
            config,
            layer_id,
            config.num_experts,
            quant_config,
            prefix,
            shared_size=config.shared_expert_intermediate_size,
        )


class Qwen2MoeModel(LlamaModel):
    """Embedding, layers and final norm."""

    layer_class = Qwen2MoeDecoderLayer


#: What `make_sparse_mlp` reads beside the number of experts.
SPARSE_FIELDS: Mapping[str, type] = {
    "moe_intermediate_size": int,
    "num_experts_per_tok": int,
    "norm_topk_prob": bool,
    "mlp_only_layers": list,
    "decoder_sparse_step": int,
}


class Qwen2MoeForCausalLM(LlamaForCausalLM):
    """Qwen2-MoE with its output head; `config` is a `transformers.Qwen2MoeConfig`."""

    model_class = Qwen2MoeModel
    config_fields: ClassVar[Mapping[str, type]] = {
        **DECODER_FIELDS,
        **SPARSE_FIELDS,
        "qkv_bias": bool,
        "layer_types": list,
        "sliding_window": int,
        "num_experts": int,
        "shared_expert_intermediate_size": int,
    }


def make_sparse_mlp(
    config: Any,
    layer_id: int,
    num_experts: int,
    quant_config: QuantizationConfig | None,
    prefix: str,
    shared_size: int | None = None,
) -> nn.Module:
    """The `mlp` of a layer of Qwen's: of experts, or an ordinary one where the config says so.

    Args:
        config: what `SPARSE_FIELDS` names, and `hidden_size`, `intermediate_size`, `hidden_act`.
        layer_id: which layer.
        num_experts, quant_config, shared_size: as for `SparseMLP`.
        prefix: module path of the layer.
    """
    is_sparse = num_experts > 0 and (layer_id + 1) % config.decoder_sparse_step == 0
    if layer_id in config.mlp_only_layers or not is_sparse:
        return make_mlp(config, quant_config, prefix)
    return SparseMLP(
        config.hidden_size,
        config.moe_intermediate_size,
        num_experts,
        config.num_experts_per_tok,
        normalize=config.norm_topk_prob,
        hidden_act=config.hidden_act,
        shared_size=shared_size,
        quant_config=quant_config,
        prefix=add_prefix("mlp", prefix),
    )
