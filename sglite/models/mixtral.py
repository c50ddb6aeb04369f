"""Mixtral: Mistral with an MLP of several experts in every layer. (Jiang et al., 2024.)

Each token uses the `num_experts_per_tok` experts with the largest probabilities, which are divided
by their sum. Checkpoints call an expert's gate, down and up projections w1, w2 and w3.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from sglite.layers import (
    ForwardBatch,
    QuantizationConfig,
    RMSNorm,
    RotaryEmbedding,
    SparseMLP,
    add_prefix,
)
from sglite.models.config import DECODER_FIELDS
from sglite.models.llama import LlamaForCausalLM, LlamaModel, make_attention


class MixtralDecoderLayer(nn.Module):
    """One layer: `x += self_attn(norm(x))`, then `x += block_sparse_moe(norm(x))`."""

    def __init__(
        self,
        config: Any,
        layer_id: int,
        rotary_emb: RotaryEmbedding,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ):
        super().__init__()
        self.self_attn = make_attention(
            config,
            layer_id,
            rotary_emb,
            quant_config,
            prefix,
            sliding_window=config.sliding_window,
        )
        self.block_sparse_moe = SparseMLP(
            config.hidden_size,
            config.intermediate_size,
            config.num_local_experts,
            config.num_experts_per_tok,
            normalize=True,
            hidden_act=config.hidden_act,
            quant_config=quant_config,
            prefix=add_prefix("block_sparse_moe", prefix),
        )
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, positions: Tensor, hidden_states: Tensor, forward_batch: ForwardBatch
    ) -> Tensor:
        """[T, hidden_size] -> [T, hidden_size]; the input stays as it is."""
        out = self.self_attn(positions, self.input_layernorm(hidden_states), forward_batch)
        hidden_states = hidden_states + out
        return hidden_states + self.block_sparse_moe(self.post_attention_layernorm(hidden_states))


class MixtralModel(LlamaModel):
    """Embedding, layers and final norm."""

    layer_class = MixtralDecoderLayer


class MixtralForCausalLM(LlamaForCausalLM):
    """Mixtral with its output head; `config` is a `transformers.MixtralConfig`."""

    model_class = MixtralModel
    config_fields: ClassVar[Mapping[str, type]] = {
        **DECODER_FIELDS,
        "head_dim": int,
        "sliding_window": int,
        "num_local_experts": int,
        "num_experts_per_tok": int,
    }
    stacked_params: ClassVar[dict[str, tuple[str, ...]]] = {
        "qkv_proj": ("q_proj", "k_proj", "v_proj"),
        "gate_up_proj": ("w1", "w3"),
        "down_proj": ("w2",),
    }
