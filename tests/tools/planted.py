"""Ten bugs, each planted in a copy of a native model: `LLM(..., architecture=name)`.

They are the bugs that people write when they port a model. Each lies in every layer, so that the
first one is where it has to be found.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from sglite import ops, register
from sglite.layers import QKVLinear, RadixAttention, RotaryEmbedding, SelfAttention
from sglite.models.llama import LlamaForCausalLM
from sglite.models.mistral import MistralForCausalLM
from sglite.models.qwen2 import Qwen2ForCausalLM
from sglite.models.qwen3 import Qwen3ForCausalLM

_ATTENTION = "model.layers.0.self_attn"


@dataclass(frozen=True)
class Bug:
    """A bug, and what has to be said of it.

    Attributes:
        name: of the bug; the architecture is called `Planted-` and that.
        checkpoint: of `tests.checkpoints.CONFIGS`.
        path: of the module that has to be named.
        position: the first one that has to be named.
    """

    name: str
    checkpoint: str
    path: str
    position: int

    @property
    def architecture(self) -> str:
        return f"Planted-{self.name}"


def plant(name: str, base: type[nn.Module], change: Callable[[nn.Module], None]) -> None:
    """Registers a subclass whose layers are changed once they are built."""

    @register(f"Planted-{name}")
    class Planted(base):
        def __init__(self, config, quant_config=None, prefix=""):
            super().__init__(config, quant_config, prefix)
            for layer in self.model.layers:
                change(layer)


def change_base(layer):
    layer.self_attn.rotary_emb = RotaryEmbedding(16, 16, 512, base=11000.0)


def change_pairing(layer):
    layer.self_attn.rotary_emb.is_interleaved = True


class WithoutNorms(SelfAttention):
    """Has norms of q and k, and forgets to call them."""

    def forward(self, positions, hidden_states, forward_batch):
        heads = self.qkv_proj(hidden_states).view(-1, self.num_heads, self.head_dim)
        q, k, v = heads.split_with_sizes(self.head_counts, 1)
        q, k = self.rotary_emb(positions, q, k)
        return self.o_proj(self.attn(q, k, v, forward_batch))


def forget_norms(layer):
    layer.self_attn.__class__ = WithoutNorms


def change_scale(layer):
    layer.self_attn.attn.scaling *= 1.1


class OtherHeads(RadixAttention):
    """Query head h reads key/value head h % num_kv_heads."""

    def forward(self, q, k, v, forward_batch):
        order = [h for group in range(self.num_kv_heads) for h in range(group, self.num_heads, 2)]
        out = super().forward(q[:, order], k, v, forward_batch)
        heads = out.view(-1, self.num_heads, self.head_dim)
        back = sorted(range(self.num_heads), key=order.__getitem__)
        return heads[:, back].flatten(1)


def change_head_order(layer):
    layer.self_attn.attn.__class__ = OtherHeads


def change_epsilon(layer):
    layer.input_layernorm.eps = layer.post_attention_layernorm.eps = 1e-5


class WithoutBias(QKVLinear):
    """Has a bias, and forgets to add it."""

    def forward(self, x):
        return ops.linear(x, self.matrix.stored)


def forget_bias(layer):
    layer.self_attn.qkv_proj.__class__ = WithoutBias


def narrow_window(layer):
    layer.self_attn.attn.sliding_window -= 1


plant("rope-base", LlamaForCausalLM, change_base)
plant("pairing", LlamaForCausalLM, change_pairing)
plant("qk-norm", Qwen3ForCausalLM, forget_norms)
plant("scale", LlamaForCausalLM, change_scale)
plant("kv-heads", LlamaForCausalLM, change_head_order)
plant("epsilon", LlamaForCausalLM, change_epsilon)
plant("bias", Qwen2ForCausalLM, forget_bias)
plant("window", MistralForCausalLM, narrow_window)


@register("Planted-gate-up")
class SwappedGateAndUp(LlamaForCausalLM):
    """Its table of weights has gate and up the wrong way round."""

    stacked_params = {  # noqa: RUF012
        "qkv_proj": ("q_proj", "k_proj", "v_proj"),
        "gate_up_proj": ("up_proj", "gate_proj"),
    }


@register("Planted-head")
class TiedHead(LlamaForCausalLM):
    """Takes the embedding for its head, although the checkpoint has one."""

    def forward(self, input_ids, positions, forward_batch, input_embeds=None):
        hidden_states = self.model(input_ids, positions, forward_batch, input_embeds)
        return self.logits_processor(
            input_ids, hidden_states, self.model.embed_tokens, forward_batch
        )


BUGS = [
    Bug("rope-base", "llama-plain", f"{_ATTENTION}.rotary_emb", 1),
    Bug("pairing", "llama-plain", f"{_ATTENTION}.rotary_emb", 1),
    Bug("qk-norm", "qwen3", f"{_ATTENTION}.q_norm", 0),
    Bug("scale", "llama-plain", f"{_ATTENTION}.attn", 1),
    Bug("gate-up", "llama-plain", "model.layers.0.mlp.gate_up_proj", 0),
    Bug("kv-heads", "llama-plain", f"{_ATTENTION}.attn", 0),
    Bug("epsilon", "llama-plain", "model.layers.0.input_layernorm", 0),
    Bug("bias", "qwen2", f"{_ATTENTION}.qkv_proj", 0),
    Bug("window", "mistral", f"{_ATTENTION}.attn", 16),
    Bug("head", "llama-plain", "lm_head", 0),
]
