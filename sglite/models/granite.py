"""Granite: Llama with four factors: on embeddings, scores, residual branches and logits.

(IBM, 2024; factors in place of tuned rates: Yang et al., 2022.) `attention_multiplier` is the
factor on the scores, and logits are divided by `logits_scaling`.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from sglite.layers import (
    ForwardBatch,
    PPProxyTensors,
    QuantizationConfig,
    RotaryEmbedding,
)
from sglite.models.config import DECODER_FIELDS
from sglite.models.llama import LlamaDecoderLayer, LlamaForCausalLM, LlamaModel


class GraniteDecoderLayer(LlamaDecoderLayer):
    """One layer: `x += m * self_attn(norm(x))`, then `x += m * mlp(norm(x))`."""

    def __init__(
        self,
        config: Any,
        layer_id: int,
        rotary_emb: RotaryEmbedding,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ):
        super().__init__(config, layer_id, rotary_emb, quant_config, prefix)
        self.residual_multiplier = config.residual_multiplier

    @staticmethod
    def attention_options(config: Any, layer_id: int) -> dict[str, Any]:
        """Further arguments of `SelfAttention`."""
        return {
            "qkv_bias": config.attention_bias,
            "output_bias": config.attention_bias,
            "scaling": config.attention_multiplier,
        }

    def forward(
        self, positions: Tensor, hidden_states: Tensor, forward_batch: ForwardBatch
    ) -> Tensor:
        """[T, hidden_size] -> [T, hidden_size]; the input stays as it is."""
        out = self.self_attn(positions, self.input_layernorm(hidden_states), forward_batch)
        hidden_states = hidden_states + out * self.residual_multiplier
        out = self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states + out * self.residual_multiplier


class GraniteModel(LlamaModel):
    """Embedding, layers and final norm."""

    layer_class = GraniteDecoderLayer

    def __init__(
        self, config: Any, quant_config: QuantizationConfig | None = None, prefix: str = ""
    ):
        super().__init__(config, quant_config, prefix)
        self.embedding_multiplier = config.embedding_multiplier

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        forward_batch: ForwardBatch,
        input_embeds: Tensor | None = None,
        pp_proxy_tensors: PPProxyTensors | None = None,
    ) -> Tensor:
        """As `DecoderModel.forward`; `input_embeds` are multiplied as well."""
        if input_embeds is None:
            input_embeds = self.embed_tokens(input_ids)
        input_embeds = input_embeds * self.embedding_multiplier
        return super().forward(input_ids, positions, forward_batch, input_embeds, pp_proxy_tensors)


class GraniteForCausalLM(LlamaForCausalLM):
    """Granite with its output head; `config` is a `transformers.GraniteConfig`."""

    model_class = GraniteModel
    config_fields: ClassVar[Mapping[str, type]] = {
        **DECODER_FIELDS,
        "attention_bias": bool,
        "mlp_bias": bool,
        "embedding_multiplier": float,
        "attention_multiplier": float,
        "residual_multiplier": float,
        "logits_scaling": float,
    }

    @staticmethod
    def logit_scale(config: Any) -> float:
        """Factor on the logits."""
        return 1.0 / config.logits_scaling
