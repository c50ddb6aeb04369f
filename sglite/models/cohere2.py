"""Cohere 2 (Command R7B, Command A): Llama with attention and MLP side by side behind one norm.

(Cohere, 2025.) The norm is LayerNorm without a bias. Layers with a sliding window rotate, in pairs
of channels that lie side by side; layers that see everything have no positions. Logits are
multiplied by `logit_scale`, and the output head is mostly tied.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from sglite.layers import (
    ForwardBatch,
    LayerNorm,
    QuantizationConfig,
    RotaryEmbedding,
    rope_from_config,
)
from sglite.models.config import BASIC_FIELDS
from sglite.models.llama import (
    LlamaForCausalLM,
    LlamaModel,
    head_dim_of,
    make_attention,
    make_mlp,
)
from sglite.models.qwen2 import sliding_window_of


class Cohere2DecoderLayer(nn.Module):
    """One layer: `x + self_attn(norm(x)) + mlp(norm(x))`."""

    def __init__(
        self,
        config: Any,
        layer_id: int,
        rotary_emb: RotaryEmbedding | None,
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
            qkv_bias=config.attention_bias,
            output_bias=config.attention_bias,
            sliding_window=sliding_window_of(config, layer_id),
        )
        self.mlp = make_mlp(config, quant_config, prefix)
        self.input_layernorm = LayerNorm(config.hidden_size, config.layer_norm_eps, bias=False)

    def forward(
        self, positions: Tensor, hidden_states: Tensor, forward_batch: ForwardBatch
    ) -> Tensor:
        """[T, hidden_size] -> [T, hidden_size]; the input stays as it is."""
        normed = self.input_layernorm(hidden_states)
        hidden_states = hidden_states + self.self_attn(positions, normed, forward_batch)
        return hidden_states + self.mlp(normed)


class Cohere2Model(LlamaModel):
    """Embedding, layers and final norm."""

    layer_class = Cohere2DecoderLayer

    @staticmethod
    def rotary_embeddings(config: Any) -> Sequence[RotaryEmbedding | None]:
        """One for each layer; None where a layer rotates nothing."""
        rotary_emb = rope_from_config(config, head_dim_of(config), is_neox_style=False)
        return [
            None if sliding_window_of(config, layer_id) is None else rotary_emb
            for layer_id in range(config.num_hidden_layers)
        ]

    @staticmethod
    def final_norm(config: Any) -> LayerNorm:
        """What comes behind the last layer."""
        return LayerNorm(config.hidden_size, config.layer_norm_eps, bias=False)


class Cohere2ForCausalLM(LlamaForCausalLM):
    """Cohere 2 with its output head; `config` is a `transformers.Cohere2Config`."""

    model_class = Cohere2Model
    config_fields: ClassVar[Mapping[str, type]] = {
        **BASIC_FIELDS,
        "head_dim": int,
        "hidden_act": str,
        "layer_norm_eps": float,
        "attention_bias": bool,
        "layer_types": list,
        "sliding_window": int,
        "logit_scale": float,
    }

    @staticmethod
    def logit_scale(config: Any) -> float:
        """Factor on the logits."""
        return config.logit_scale
