"""OLMo 2: Llama with its norms behind attention and MLP, and a norm over all heads of q and k.

(OLMo et al., 2024.) Nothing is normalised in front of attention and MLP; the norms of q and of k
run over all of their heads together.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from sglite.layers import (
    ForwardBatch,
    QuantizationConfig,
    RMSNorm,
    RotaryEmbedding,
    SelfAttention,
)
from sglite.models.config import DECODER_FIELDS
from sglite.models.llama import LlamaForCausalLM, LlamaModel, make_attention, make_mlp


class Olmo2Attention(SelfAttention):
    """Self-attention with norms over the whole of q and of k.

    Args:
        norm_eps: of the two norms.
        **options: as for `SelfAttention`.
    """

    def __init__(self, *, norm_eps: float, **options: Any):
        super().__init__(**options)
        self.widths = [count * self.head_dim for count in self.head_counts]
        self.q_norm = RMSNorm(self.widths[0], norm_eps)
        self.k_norm = RMSNorm(self.widths[1], norm_eps)

    def forward(
        self, positions: Tensor, hidden_states: Tensor, forward_batch: ForwardBatch
    ) -> Tensor:
        """[T, hidden_size] -> [T, hidden_size]."""
        q, k, v = self.qkv_proj(hidden_states).split(self.widths, 1)
        q, k = self.rotary_emb(positions, self.q_norm(q), self.k_norm(k))
        return self.o_proj(self.attn(q, k, v, forward_batch))


class Olmo2DecoderLayer(nn.Module):
    """One layer: `x += norm(self_attn(x))`, then `x += norm(mlp(x))`."""

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
            Olmo2Attention,
            norm_eps=config.rms_norm_eps,
            qkv_bias=config.attention_bias,
            output_bias=config.attention_bias,
        )
        self.mlp = make_mlp(config, quant_config, prefix)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_feedforward_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, positions: Tensor, hidden_states: Tensor, forward_batch: ForwardBatch
    ) -> Tensor:
        """[T, hidden_size] -> [T, hidden_size]; the input stays as it is."""
        out = self.self_attn(positions, hidden_states, forward_batch)
        hidden_states = hidden_states + self.post_attention_layernorm(out)
        return hidden_states + self.post_feedforward_layernorm(self.mlp(hidden_states))


class Olmo2Model(LlamaModel):
    """Embedding, layers and final norm."""

    layer_class = Olmo2DecoderLayer


class Olmo2ForCausalLM(LlamaForCausalLM):
    """OLMo 2 with its output head; `config` is a `transformers.Olmo2Config`."""

    model_class = Olmo2Model
    config_fields: ClassVar[Mapping[str, type]] = {**DECODER_FIELDS, "attention_bias": bool}
