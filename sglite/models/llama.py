"""Llama (1 to 3.x), the model that the other files describe themselves by.

RMSNorm in front of attention and MLP, rotary positions, grouped-query attention, a gated MLP with
SiLU; no biases unless the config asks for them. (Touvron et al., 2023; Dubey et al., 2024.)
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from sglite.layers import (
    DecoderLayer,
    DecoderModel,
    Embedding,
    ForwardBatch,
    GatedMLP,
    LMHead,
    LogitsProcessor,
    LogitsProcessorOutput,
    PPProxyTensors,
    QuantizationConfig,
    RMSNorm,
    RotaryEmbedding,
    SelfAttention,
    add_prefix,
    rope_from_config,
)
from sglite.layers.decoder import run_for_logits
from sglite.layers.porting import refuse_pipeline_and_embedding
from sglite.models.config import DECODER_FIELDS


class LlamaDecoderLayer(DecoderLayer):
    """One layer. A family that differs in it overrides `attention_options` or `mlp_options`."""

    def __init__(
        self,
        config: Any,
        layer_id: int,
        rotary_emb: RotaryEmbedding | None,
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
                **self.attention_options(config, layer_id),
            ),
            mlp=self.build_mlp(config, layer_id, quant_config, prefix),
            input_layernorm=RMSNorm(config.hidden_size, config.rms_norm_eps),
            post_attention_layernorm=RMSNorm(config.hidden_size, config.rms_norm_eps),
        )

    @staticmethod
    def attention_options(config: Any, layer_id: int) -> dict[str, Any]:
        """Further arguments of `SelfAttention`."""
        return {"qkv_bias": config.attention_bias, "output_bias": config.attention_bias}

    @staticmethod
    def mlp_options(config: Any) -> dict[str, Any]:
        """Further arguments of `GatedMLP`."""
        return {"bias": config.mlp_bias}

    @classmethod
    def build_mlp(
        cls, config: Any, layer_id: int, quant_config: QuantizationConfig | None, prefix: str
    ) -> nn.Module:
        """The `mlp` of a layer; a family overrides it whose layers have no `GatedMLP`."""
        return make_mlp(config, quant_config, prefix, **cls.mlp_options(config))


class LlamaModel(DecoderModel):
    """Embedding, layers and final norm.

    A family names its `layer_class`, and overrides the methods for what else it has of its own.
    """

    layer_class: ClassVar[Callable[..., nn.Module]] = LlamaDecoderLayer

    def __init__(
        self, config: Any, quant_config: QuantizationConfig | None = None, prefix: str = ""
    ):
        super().__init__(
            embed_tokens=Embedding(
                config.vocab_size,
                config.hidden_size,
                prefix=add_prefix("embed_tokens", prefix),
                scale=self.embedding_scale(config),
            ),
            layers=(
                self.layer_class(
                    config, i, rotary_emb, quant_config, add_prefix(f"layers.{i}", prefix)
                )
                for i, rotary_emb in enumerate(self.rotary_embeddings(config))
            ),
            norm=self.final_norm(config),
        )

    @staticmethod
    def embedding_scale(config: Any) -> float | None:
        """Factor on the embeddings of tokens."""
        return None

    @staticmethod
    def rotary_embeddings(config: Any) -> Sequence[RotaryEmbedding | None]:
        """One for each layer; None where a layer rotates nothing."""
        return [rope_from_config(config, head_dim_of(config))] * config.num_hidden_layers

    @staticmethod
    def final_norm(config: Any) -> nn.Module:
        """What comes behind the last layer."""
        return RMSNorm(config.hidden_size, config.rms_norm_eps)


class LlamaForCausalLM(nn.Module):
    """Llama with its output head.

    Args:
        config: a `transformers.LlamaConfig`, or an object with its attributes.
        quant_config: must be None.
        prefix: module path, for messages.
    """

    model_class: ClassVar[type[LlamaModel]] = LlamaModel
    # All that this class and its parts read of the config.
    config_fields: ClassVar[Mapping[str, type]] = {
        **DECODER_FIELDS,
        "head_dim": int,
        "attention_bias": bool,
        "mlp_bias": bool,
    }
    stacked_params: ClassVar[dict[str, tuple[str, ...]]] = {
        "qkv_proj": ("q_proj", "k_proj", "v_proj"),
        "gate_up_proj": ("gate_proj", "up_proj"),
    }

    def __init__(
        self, config: Any, quant_config: QuantizationConfig | None = None, prefix: str = ""
    ):
        super().__init__()
        self.config = config
        self.model = self.model_class(config, quant_config, add_prefix("model", prefix))
        self.lm_head = LMHead(
            config.vocab_size, config.hidden_size, prefix=add_prefix("lm_head", prefix)
        )
        if config.tie_word_embeddings:
            self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(config, self.logit_scale(config))

    @staticmethod
    def logit_scale(config: Any) -> float | None:
        """Factor on the logits."""
        return None

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        forward_batch: ForwardBatch,
        input_embeds: Tensor | None = None,
        pp_proxy_tensors: PPProxyTensors | None = None,
        get_embedding: bool = False,
    ) -> LogitsProcessorOutput:
        """Next-token logits of the rows that the batch wants.

        Args:
            input_ids: [T] int64.
            positions: [T] int64, of each token in its own sequence.
            forward_batch: whose tokens these are, and the cache.
            input_embeds: [T, hidden_size], instead of the embedding of `input_ids`.
            pp_proxy_tensors: must be None.
            get_embedding: must be False.
        """
        refuse_pipeline_and_embedding(pp_proxy_tensors, get_embedding)
        hidden_states = run_for_logits(
            self.model, self.logits_processor, input_ids, positions, forward_batch, input_embeds
        )
        return self.logits_processor(input_ids, hidden_states, self.lm_head, forward_batch)


def head_dim_of(config: Any) -> int:
    """Channels of a head: the config's, or the hidden size divided among the heads."""
    given = getattr(config, "head_dim", None)
    return given or config.hidden_size // config.num_attention_heads


def make_attention(
    config: Any,
    layer_id: int,
    rotary_emb: RotaryEmbedding | None,
    quant_config: QuantizationConfig | None,
    prefix: str,
    kind: type[SelfAttention] = SelfAttention,
    **options: Any,
) -> SelfAttention:
    """The `self_attn` of a layer, by the config's numbers.

    Args:
        config: has `hidden_size`, the two numbers of heads, and maybe `head_dim`.
        layer_id, rotary_emb, quant_config: as for `SelfAttention`.
        prefix: module path of the layer.
        kind: the class to make one of.
        **options: its further arguments.
    """
    return kind(
        hidden_size=config.hidden_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=head_dim_of(config),
        rotary_emb=rotary_emb,
        layer_id=layer_id,
        quant_config=quant_config,
        prefix=add_prefix("self_attn", prefix),
        **options,
    )


def make_mlp(
    config: Any, quant_config: QuantizationConfig | None, prefix: str, **options: Any
) -> GatedMLP:
    """The `mlp` of a layer, by the config's numbers.

    Args:
        config: has `hidden_size`, `intermediate_size` and `hidden_act`, unless `options` has it.
        quant_config: as for `GatedMLP`.
        prefix: module path of the layer.
        **options: further arguments of `GatedMLP`.
    """
    return GatedMLP(
        config.hidden_size,
        config.intermediate_size,
        quant_config=quant_config,
        prefix=add_prefix("mlp", prefix),
        **{"hidden_act": getattr(config, "hidden_act", None), **options},
    )
