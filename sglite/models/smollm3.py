"""SmolLM3: Llama with layers that rotate nothing, and windows as Qwen2 has them.

(Bakouch et al., 2025; layers without positions: Yang et al., 2025.) `no_rope_layers` has a 1 for
each layer that rotates, and a 0 for each that does not.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from sglite.layers import RotaryEmbedding, rope_from_config
from sglite.models.config import DECODER_FIELDS
from sglite.models.llama import LlamaDecoderLayer, LlamaForCausalLM, LlamaModel, head_dim_of
from sglite.models.qwen2 import sliding_window_of


class SmolLM3DecoderLayer(LlamaDecoderLayer):
    """One layer."""

    @staticmethod
    def attention_options(config: Any, layer_id: int) -> dict[str, Any]:
        """Further arguments of `SelfAttention`."""
        return {
            "qkv_bias": config.attention_bias,
            "output_bias": config.attention_bias,
            "sliding_window": sliding_window_of(config, layer_id),
        }


class SmolLM3Model(LlamaModel):
    """Embedding, layers and final norm."""

    layer_class = SmolLM3DecoderLayer

    @staticmethod
    def rotary_embeddings(config: Any) -> Sequence[RotaryEmbedding | None]:
        """One for each layer; None where a layer rotates nothing."""
        rotary_emb = rope_from_config(config, head_dim_of(config))
        return [
            rotary_emb if config.no_rope_layers[layer_id] else None
            for layer_id in range(config.num_hidden_layers)
        ]


class SmolLM3ForCausalLM(LlamaForCausalLM):
    """SmolLM3 with its output head; `config` is a `transformers.SmolLM3Config`."""

    model_class = SmolLM3Model
    config_fields: ClassVar[Mapping[str, type]] = {
        **DECODER_FIELDS,
        "attention_bias": bool,
        "mlp_bias": bool,
        "no_rope_layers": list,
        "layer_types": list,
        "sliding_window": int,
    }
