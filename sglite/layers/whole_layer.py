"""A decoder layer as one op: on the CPU, while all of its parts are plain.

What the op takes is gathered once and kept. In every call it is compared with what the parts hold
now, which is much less work: parts, weights and numbers may be replaced, and hooks added, at any
time.
"""

from operator import is_
from typing import Any, NamedTuple

from torch import Tensor, nn

from sglite import ops
from sglite.layers.attention import RadixAttention, SelfAttention
from sglite.layers.composite import are_plain
from sglite.layers.forward_batch import ForwardBatch
from sglite.layers.linear import GateUpLinear, Linear, QKVLinear
from sglite.layers.mlp import GatedMLP, op_name
from sglite.layers.norm import RMSNorm
from sglite.layers.rotary import RotaryEmbedding

# Where a layer keeps it.
_KEPT = "_whole_layer"
_KINDS = (SelfAttention, GatedMLP, RMSNorm, RMSNorm, QKVLinear, RotaryEmbedding, RadixAttention)
_KINDS += (Linear, GateUpLinear, Linear)


def run_whole_layer(
    layer: nn.Module, positions: Tensor, hidden_states: Tensor, forward_batch: ForwardBatch
) -> Tensor | None:
    """What a `DecoderLayer` gives, in one call; None where its parts have to run one by one.

    Args:
        layer: has `self_attn`, `mlp`, `input_layernorm` and `post_attention_layernorm`.
        positions: [T] int64.
        hidden_states: [T, hidden_size].
        forward_batch: whose tokens these are, and the cache.
    """
    if hidden_states.is_cuda:
        layer.__dict__.pop(_KEPT, None)  # weights that have moved since
        return None
    modules = _modules_of(layer)
    if modules is None or not are_plain(zip(modules, _kinds(modules), strict=True)):
        return None
    held = _held_by(modules)
    whole = layer.__dict__.get(_KEPT)
    if whole is None or not whole.is_of(modules, held):
        whole = layer.__dict__[_KEPT] = _gather(modules, held)
    if whole.parts is None or not hidden_states.is_contiguous():
        return None
    batch, parts, scratch = forward_batch.layer_batch(positions), whole.parts, forward_batch.scratch
    k_cache, v_cache = forward_batch.kv_cache[modules[6].layer_id]
    return modules[5].with_table(
        positions,
        lambda cos_sin: ops.decoder_layer(
            hidden_states, batch, parts, cos_sin, k_cache, v_cache, scratch
        ),
    )


class _Held(NamedTuple):
    """What the parts of a layer hold now: `objects` are compared as such, `numbers` by value."""

    objects: tuple[Any, ...]
    numbers: tuple[Any, ...]


class _WholeLayer(NamedTuple):
    """What was gathered, and what of."""

    modules: tuple[nn.Module, ...]
    held: _Held
    parts: ops.LayerParts | None  # None: not of the kind that the op takes

    def is_of(self, modules: tuple[nn.Module, ...], held: _Held) -> bool:
        return (
            len(modules) == len(self.modules)
            and all(map(is_, modules, self.modules))
            and all(map(is_, held.objects, self.held.objects))
            and held.numbers == self.held.numbers
        )


def _modules_of(layer: nn.Module) -> tuple[nn.Module, ...] | None:
    """The parts, in the order of `_KINDS`; norms of q and k at the end, where there are any.

    They are looked up in their tables: through `__getattr__` all together would take longer than
    the op's arithmetic in a small model.
    """
    children = layer._modules
    attention, mlp = children["self_attn"], children["mlp"]
    if type(attention) is not SelfAttention or type(mlp) is not GatedMLP:
        return None
    parts, mlp_parts = attention._modules, mlp._modules
    modules = (
        attention,
        mlp,
        children["input_layernorm"],
        children["post_attention_layernorm"],
        parts["qkv_proj"],
        parts["rotary_emb"],
        parts["attn"],
        parts["o_proj"],
        mlp_parts["gate_up_proj"],
        mlp_parts["down_proj"],
    )
    q_norm = parts.get("q_norm")
    return modules if q_norm is None else (*modules, q_norm, parts["k_norm"])


def _kinds(modules: tuple[nn.Module, ...]) -> tuple[type[nn.Module], ...]:
    return _KINDS if len(modules) == len(_KINDS) else (*_KINDS, RMSNorm, RMSNorm)


def _held_by(modules: tuple[nn.Module, ...]) -> _Held:
    _, mlp, input_norm, post_norm, qkv, rotary, attn, output, gate_up, down, *norms = modules
    return _Held(
        (
            input_norm._parameters["weight"],
            post_norm._parameters["weight"],
            qkv.matrix.stored,
            output.matrix.stored,
            gate_up.matrix.stored,
            down.matrix.stored,
            qkv.bias,
            output.bias,
            gate_up.bias,
            down.bias,
            *(norm._parameters["weight"] for norm in norms),
        ),
        (
            op_name(mlp._modules["act_fn"]),
            input_norm.eps,
            input_norm.weight_offset,
            post_norm.eps,
            post_norm.weight_offset,
            rotary.is_interleaved,
            attn.scaling,
            attn.sliding_window,
            attn.logit_cap,
            *(number for norm in norms for number in (norm.eps, norm.weight_offset)),
        ),
    )


def _gather(modules: tuple[nn.Module, ...], held: _Held) -> _WholeLayer:
    weights, biases, norm_weights = held.objects[2:6], held.objects[6:10], held.objects[10:]
    activation, *norm_numbers = held.numbers[:5]
    norms_of_qk = (None, None, 0.0, 0.0)
    norms_agree = True
    if norm_weights:
        norms_of_qk = (*norm_weights, *held.numbers[9:11])
        norms_agree = held.numbers[9:11] == held.numbers[11:]
    if (
        activation is None
        or not norms_agree
        or any(type(weight) is not ops.PackedWeight for weight in weights)
    ):
        return _WholeLayer(modules, held, None)
    qkv, output, gate_up, down = map(ops.LinearPart.of, weights, biases)
    parts = ops.LayerParts(
        ops.NormPart(held.objects[0], *norm_numbers[:2]),
        qkv,
        ops.AttentionPart(*norms_of_qk, *held.numbers[5:9]),
        output,
        ops.NormPart(held.objects[1], *norm_numbers[2:]),
        gate_up,
        activation,
        down,
    )
    return _WholeLayer(modules, held, parts)
