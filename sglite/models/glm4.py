"""GLM-4 of 2025 (0414): GLM with a norm behind attention and MLP as well. (Zhipu AI, 2025.)"""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from sglite.layers import ForwardBatch, QuantizationConfig, RMSNorm, RotaryEmbedding
from sglite.models.glm import GlmDecoderLayer, GlmForCausalLM, GlmModel


class Glm4DecoderLayer(GlmDecoderLayer):
    """One layer: `x += norm(self_attn(norm(x)))`, then `x += norm(mlp(norm(x)))`."""

    def __init__(
        self,
        config: Any,
        layer_id: int,
        rotary_emb: RotaryEmbedding,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ):
        super().__init__(config, layer_id, rotary_emb, quant_config, prefix)
        self.post_self_attn_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_mlp_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, positions: Tensor, hidden_states: Tensor, forward_batch: ForwardBatch
    ) -> Tensor:
        """[T, hidden_size] -> [T, hidden_size]; the input stays as it is."""
        out = self.self_attn(positions, self.input_layernorm(hidden_states), forward_batch)
        hidden_states = hidden_states + self.post_self_attn_layernorm(out)
        out = self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states + self.post_mlp_layernorm(out)


class Glm4Model(GlmModel):
    """Embedding, layers and final norm."""

    layer_class = Glm4DecoderLayer


class Glm4ForCausalLM(GlmForCausalLM):
    """GLM-4 with its output head; `config` is a `transformers.Glm4Config`."""

    model_class = Glm4Model
    config_fields: ClassVar[Mapping[str, type]] = GlmForCausalLM.config_fields
