"""StableLM: Llama with LayerNorm, and heads of which only a share rotates.

A model file as `docs/new_models.md` has one write it, for an architecture that the library has no
file for. (Bellagente et al., 2024.) q, k and v have a bias if `use_qkv_bias` says so. What StableLM
2 12B has beside it, attention and MLP side by side and norms of single heads, is refused by name.

`python examples/stablelm.py FOLDER` compares a checkpoint to Hugging Face.
"""

import sys

import sglite
from sglite import UnsupportedModelError, register
from sglite.layers import DecoderLayer, LayerNorm, rope_from_config
from sglite.models.llama import (
    LlamaForCausalLM,
    LlamaModel,
    head_dim_of,
    make_attention,
    make_mlp,
)


class StableLmDecoderLayer(DecoderLayer):
    """One layer."""

    def __init__(self, config, layer_id, rotary_emb, quant_config=None, prefix=""):
        for name in ("use_parallel_residual", "qk_layernorm"):
            if getattr(config, name):
                raise UnsupportedModelError(f"StableLM with {name} is not implemented")
        numbers = config, layer_id, rotary_emb, quant_config, prefix
        super().__init__(
            self_attn=make_attention(*numbers, qkv_bias=config.use_qkv_bias),
            mlp=make_mlp(config, quant_config, prefix),
            input_layernorm=LayerNorm(config.hidden_size, config.layer_norm_eps),
            post_attention_layernorm=LayerNorm(config.hidden_size, config.layer_norm_eps),
        )


class StableLmModel(LlamaModel):
    """Embedding, layers and final norm."""

    layer_class = StableLmDecoderLayer

    @staticmethod
    def rotary_embeddings(config):
        """One for each layer."""
        rotary_emb = rope_from_config(config, head_dim_of(config), is_partial=True)
        return [rotary_emb] * config.num_hidden_layers

    @staticmethod
    def final_norm(config):
        """What comes behind the last layer."""
        return LayerNorm(config.hidden_size, config.layer_norm_eps)


@register("StableLmForCausalLM")
class StableLmForCausalLM(LlamaForCausalLM):
    """StableLM with its output head."""

    model_class = StableLmModel


if __name__ == "__main__":
    report = sglite.compare(sys.argv[1])
    print(report)
    sys.exit(not report)
