"""StarCoder2: Llama with LayerNorm, an MLP without a gate, and biases in every linear layer.

(Lozhkov et al., 2024.) `use_bias` says whether linear layers have one; norms always do. A sliding
window in every layer if `sliding_window` is set.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from sglite.layers import (
    DecoderLayer,
    LayerNorm,
    PlainMLP,
    QuantizationConfig,
    RotaryEmbedding,
    add_prefix,
)
from sglite.models.config import BASIC_FIELDS
from sglite.models.llama import LlamaForCausalLM, LlamaModel, make_attention


class Starcoder2DecoderLayer(DecoderLayer):
    """One layer."""

    def __init__(
        self,
        config: Any,
        layer_id: int,
        rotary_emb: RotaryEmbedding,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ):
        super().__init__(
            self_attn=make_attention(
                config,
                layer_id,
                rotary_emb,
                quant_config,
                prefix,
                qkv_bias=config.use_bias,
                output_bias=config.use_bias,
                sliding_window=config.sliding_window,
            ),
            mlp=PlainMLP(
                config.hidden_size,
                config.intermediate_size,
                config.hidden_act,
                config.use_bias,
                quant_config,
                add_prefix("mlp", prefix),
            ),
            input_layernorm=LayerNorm(config.hidden_size, config.norm_epsilon),
            post_attention_layernorm=LayerNorm(config.hidden_size, config.norm_epsilon),
        )


class Starcoder2Model(LlamaModel):
    """Embedding, layers and final norm."""

    layer_class = Starcoder2DecoderLayer

    @staticmethod
    def final_norm(config: Any) -> LayerNorm:
        """What comes behind the last layer."""
        return LayerNorm(config.hidden_size, config.norm_epsilon)


class Starcoder2ForCausalLM(LlamaForCausalLM):
    """StarCoder2 with its output head; `config` is a `transformers.Starcoder2Config`."""

    model_class = Starcoder2Model
    config_fields: ClassVar[Mapping[str, type]] = {
        **BASIC_FIELDS,
        "hidden_act": str,
        "norm_epsilon": float,
        "use_bias": bool,
        "sliding_window": int,
    }
    stacked_params: ClassVar[dict[str, tuple[str, ...]]] = {
        "qkv_proj": ("q_proj", "k_proj", "v_proj")
    }
