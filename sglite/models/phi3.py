"""Phi-3 and Phi-4: Llama whose checkpoints hold q, k, v as one tensor, and gate and up as one.

(Abdin et al., 2024.) Never a bias; a sliding window in every layer if `sliding_window` is set; a
share of each head rotates if `partial_rotary_factor` says so (Phi-4-mini). Checkpoints for long
contexts scale RoPE by "longrope", whose context is the original one unless
`context_length` asks for more: see `sglite.layers.rope_frequencies`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from sglite.interface.errors import UnsupportedModelError
from sglite.layers import RotaryEmbedding, rope_from_config
from sglite.models.config import DECODER_FIELDS
from sglite.models.llama import LlamaForCausalLM, LlamaModel, head_dim_of
from sglite.models.mistral import MistralDecoderLayer


class Phi3Model(LlamaModel):
    """Embedding, layers and final norm."""

    layer_class = MistralDecoderLayer

    @staticmethod
    def rotary_embeddings(config: Any) -> Sequence[RotaryEmbedding]:
        """One for each layer."""
        rotary_emb = rope_from_config(config, head_dim_of(config), is_partial=True)
        kind = rotary_emb.parameters.kind
        if kind not in ("default", "longrope"):
            # Files of this family have called their longrope by another kind's name.
            raise UnsupportedModelError(
                f"rope_parameters: the kind {kind!r} is not implemented for Phi-3; known kinds: "
                f"default, longrope"
            )
        return [rotary_emb] * config.num_hidden_layers


class Phi3ForCausalLM(LlamaForCausalLM):
    """Phi-3 or Phi-4 with its output head; `config` is a `transformers.Phi3Config`."""

    model_class = Phi3Model
    config_fields: ClassVar[Mapping[str, type]] = {
        **DECODER_FIELDS,
        "rope_parameters.partial_rotary_factor": float,
        "sliding_window": int,
    }
    stacked_params: ClassVar[dict[str, tuple[str, ...]]] = {}
