"""Gemma 2: Llama with a norm behind attention and MLP as well, soft caps, and every other window.

(Gemma Team, 2024.) Norm weights lie around zero (`x * (1 + weight)`), embeddings are multiplied by
the square root of their width, scores are scaled by `query_pre_attn_scalar ** -0.5` and capped, and
so are the logits; the activation is GELU, and the output head mostly tied. `layer_types` says which
layers have a sliding window.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from sglite.interface.errors import UnsupportedModelError
from sglite.layers import ForwardBatch, QuantizationConfig, RMSNorm, RotaryEmbedding
from sglite.models.config import BASIC_FIELDS
from sglite.models.llama import LlamaForCausalLM, LlamaModel, make_attention, make_mlp
from sglite.models.qwen2 import sliding_window_of


class Gemma2DecoderLayer(nn.Module):
    """One layer: `x += norm(self_attn(norm(x)))`, then `x += norm(mlp(norm(x)))`."""

    def __init__(
        self,
        config: Any,
        layer_id: int,
        rotary_emb: RotaryEmbedding,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ):
        super().__init__()
        refuse_both_ways(config)
        self.self_attn = make_attention(
            config,
            layer_id,
            rotary_emb,
            quant_config,
            prefix,
            qkv_bias=config.attention_bias,
            output_bias=config.attention_bias,
            scaling=config.query_pre_attn_scalar**-0.5,
            sliding_window=sliding_window_of(config, layer_id),
            **self.score_options(config),
        )
        self.mlp = make_mlp(config, quant_config, prefix, hidden_act=config.hidden_activation)
        self.input_layernorm = gemma_norm(config)
        self.post_attention_layernorm = gemma_norm(config)
        self.pre_feedforward_layernorm = gemma_norm(config)
        self.post_feedforward_layernorm = gemma_norm(config)

    @staticmethod
    def score_options(config: Any) -> dict[str, Any]:
        """Arguments of `SelfAttention` for the scores, beside their scale."""
        return {"logit_cap": config.attn_logit_softcapping}

    def forward(
        self, positions: Tensor, hidden_states: Tensor, forward_batch: ForwardBatch
    ) -> Tensor:
        """[T, hidden_size] -> [T, hidden_size]; the input stays as it is."""
        out = self.self_attn(positions, self.input_layernorm(hidden_states), forward_batch)
        hidden_states = hidden_states + self.post_attention_layernorm(out)
        out = self.mlp(self.pre_feedforward_layernorm(hidden_states))
        return hidden_states + self.post_feedforward_layernorm(out)


class Gemma2Model(LlamaModel):
    """Embedding, layers and final norm."""

    layer_class = Gemma2DecoderLayer

    @staticmethod
    def embedding_scale(config: Any) -> float:
        """Factor on the embeddings of tokens."""
        return config.hidden_size**0.5

    @staticmethod
    def final_norm(config: Any) -> RMSNorm:
        """What comes behind the last layer."""
        return gemma_norm(config)


class Gemma2ForCausalLM(LlamaForCausalLM):
    """Gemma 2 with its output head; `config` is a `transformers.Gemma2Config`."""

    model_class = Gemma2Model
    config_fields: ClassVar[Mapping[str, type]] = {
        **BASIC_FIELDS,
        "head_dim": int,
        "rms_norm_eps": float,
        "hidden_activation": str,
        "attention_bias": bool,
        "query_pre_attn_scalar": float,
        "layer_types": list,
        "sliding_window": int,
        "attn_logit_softcapping": float,
        "final_logit_softcapping": float,
        "use_bidirectional_attention": bool,
    }


def gemma_norm(config: Any) -> RMSNorm:
    """A norm over hidden states whose weights lie around zero."""
    return RMSNorm(config.hidden_size, config.rms_norm_eps, weight_offset=1.0)


def refuse_both_ways(config: Any) -> None:
    """Raises UnsupportedModelError if tokens are to see those behind them (EmbeddingGemma)."""
    if config.use_bidirectional_attention:
        raise UnsupportedModelError(
            "use_bidirectional_attention=True is not implemented: text is generated with causal "
            "attention"
        )
