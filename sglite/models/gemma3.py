"""Gemma 3, text: Gemma 2 without a cap on scores, with norms of q and k, and two kinds of RoPE.

(Gemma Team, 2025.) `rope_parameters` has a table for the layers with a window, and one for those
that see everything, which may be scaled.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from sglite.layers import RotaryEmbedding, rope_from_config
from sglite.models.config import BASIC_FIELDS
from sglite.models.gemma2 import Gemma2DecoderLayer, Gemma2ForCausalLM, Gemma2Model
from sglite.models.llama import head_dim_of


class Gemma3DecoderLayer(Gemma2DecoderLayer):
    """One layer."""

    @staticmethod
    def score_options(config: Any) -> dict[str, Any]:
        """Arguments of `SelfAttention` for the scores, beside their scale."""
        return {"qk_norm_eps": config.rms_norm_eps, "qk_norm_offset": 1.0}


class Gemma3Model(Gemma2Model):
    """Embedding, layers and final norm."""

    layer_class = Gemma3DecoderLayer

    @staticmethod
    def rotary_embeddings(config: Any) -> Sequence[RotaryEmbedding]:
        """One for each layer."""
        layer_types = config.layer_types[: config.num_hidden_layers]
        of_type = {
            kind: rope_from_config(config, head_dim_of(config), layer_type=kind)
            for kind in dict.fromkeys(layer_types)
        }
        return [of_type[kind] for kind in layer_types]


class Gemma3ForCausalLM(Gemma2ForCausalLM):
    """Gemma 3 with its output head; `config` is a `transformers.Gemma3TextConfig`."""

    model_class = Gemma3Model
    config_fields: ClassVar[Mapping[str, type]] = {
        **BASIC_FIELDS,
        "head_dim": int,
        "rms_norm_eps": float,
        "hidden_activation": str,
        "attention_bias": bool,
        "query_pre_attn_scalar": float,
        "layer_types": list,
        "sliding_window": int,
        "final_logit_softcapping": float,
        "use_bidirectional_attention": bool,
    }
