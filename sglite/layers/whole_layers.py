"""Decoder layers as one op: on the CPU, while all of their parts are plain.

What the op takes of a layer is gathered once and kept, together with where it was found. In every
call what lies there now is compared with it, which is much less work: parts, weights and numbers
may be replaced, and hooks added, at any time.
"""

from collections.abc import Iterator, Sequence
from itertools import chain, repeat
from operator import contains, getitem, is_
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

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


def find_whole(layer: nn.Module, hidden_states: Tensor) -> "WholeLayer | None":
    """The layer as `run_whole` takes it; None where its parts have to run one by one.

    Args:
        layer: has `self_attn`, `mlp`, `input_layernorm` and `post_attention_layernorm`.
        hidden_states: what it is to be run on.
    """
    if hidden_states.is_cuda:
        return None
    whole = layer.__dict__.get(_KEPT)
    if whole is None or not whole.is_of(layer):
        whole = layer.__dict__[_KEPT] = _gather(layer)
    return whole


def run_whole(
    layers: Sequence["WholeLayer"],
    positions: Tensor,
    hidden_states: Tensor,
    forward_batch: ForwardBatch,
) -> Tensor:
    """What the layers give, one after the other, in one call.

    Args:
        layers: at least one.
        positions: [T] int64, or [3, T] for M-RoPE.
        hidden_states: [T, hidden_size], on the CPU.
        forward_batch: whose tokens these are, and the cache.
    """

    def run() -> Tensor:
        rows, _ = layers[0].rotary.rows_and_table(positions)
        return ops.decoder_layers(
            hidden_states.contiguous(),
            forward_batch.layer_batch(rows),
            [layer.call(positions, forward_batch.kv_cache) for layer in layers],
            forward_batch.scratch,
        )

    try:
        return run()
    except IndexError:  # a position that is new to a table of angles
        for layer in layers:
            layer.rotary.table.grow_for(positions)
        return run()


class _Place(NamedTuple):
    """Where something was found: `table[key]`."""

    table: dict[str, Any]
    key: str


class WholeLayer:
    """What was gathered of a layer, and what of.

    Args:
        layer: the layer.
        modules: its parts, all of them plain, and what else must not be listened to.
        places: where everything lies that `parts` is made of, and the modules.
        parts: what the op takes.

    Attributes:
        parts: the same.
        rotary, attn: of the modules the two that the op does not replace altogether.
    """

    def __init__(
        self,
        layer: nn.Module,
        modules: "_Modules",
        places: list[_Place],
        parts: ops.LayerParts,
    ):
        self.parts = parts
        self.rotary = modules.rotary
        self.attn = modules.attn
        self._children = layer._modules
        self._modules = tuple(modules.present())
        self._kinds = tuple(map(type, self._modules))
        self._own_tables = tuple(vars(module) for module in self._modules)
        hooks = [(module._forward_hooks, module._forward_pre_hooks) for module in self._modules]
        self._hooks = (_global_forward_hooks, _global_forward_pre_hooks, *chain(*hooks))
        self._tables, self._keys = zip(*places, strict=True)
        self._found = tuple(map(getitem, self._tables, self._keys))

    def is_of(self, layer: nn.Module) -> bool:
        """Whether gathering anew would give the same.

        All loops run inside the interpreter's own functions: they are as fast as the op itself in
        a small model.
        """
        try:
            return (
                layer._modules is self._children
                and not any(self._hooks)
                and all(map(is_, map(getitem, self._tables, self._keys), self._found))
                and all(map(is_, map(type, self._modules), self._kinds))
                and not any(map(contains, self._own_tables, repeat("forward")))
            )
        except KeyError:  # what was no parameter is one now, or the other way round
            return False

    def call(self, positions: Tensor, kv_cache: Sequence[tuple[Tensor, Tensor]]) -> ops.LayerCall:
        """What the op takes for one run over this cache, at these positions, [T] or [3, T]."""
        _, cos_sin = self.rotary.rows_and_table(positions)
        return ops.LayerCall(self.parts, cos_sin, *kv_cache[self.attn.layer_id])

    def __reduce__(self) -> tuple[type[None], tuple]:
        """A copy of the layer, which has other tables, starts with nothing."""
        return type(None), ()


class _Modules(NamedTuple):
    """The parts of a layer."""

    attention: nn.Module
    mlp: nn.Module
    input_norm: nn.Module
    post_norm: nn.Module
    qkv: nn.Module
    rotary: nn.Module
    attn: nn.Module
    output: nn.Module
    gate_up: nn.Module
    down: nn.Module
    activation: nn.Module
    q_norm: nn.Module | None
    k_norm: nn.Module | None

    def present(self) -> Iterator[nn.Module]:
        """Those that there are."""
        return (module for module in self if module is not None)


_KINDS = _Modules(
    SelfAttention,
    GatedMLP,
    RMSNorm,
    RMSNorm,
    QKVLinear,
    RotaryEmbedding,
    RadixAttention,
    Linear,
    GateUpLinear,
    Linear,
    nn.Module,  # `op_name` says whether it is plain
    RMSNorm,
    RMSNorm,
)


def _gather(layer: nn.Module) -> WholeLayer | None:
    """What the op takes of a layer now; None where it takes none."""
    attention, mlp = layer.self_attn, layer.mlp
    if type(attention) is not SelfAttention or type(mlp) is not GatedMLP:
        return None
    if attention.rotary_emb is None:
        return None
    has_norms = attention.q_norm is not None
    places = [
        _Place(layer._modules, "self_attn"),
        _Place(layer._modules, "mlp"),
        _Place(layer._modules, "input_layernorm"),
        _Place(layer._modules, "post_attention_layernorm"),
        *(_Place(attention._modules, name) for name in ("qkv_proj", "rotary_emb", "attn")),
        _Place(attention._modules, "o_proj"),
        *(_Place(mlp._modules, name) for name in ("gate_up_proj", "down_proj", "act_fn")),
        *(_place(attention, name) for name in ("q_norm", "k_norm")),
    ]
    modules = _Modules(*(table[key] for table, key in places))
    activation = op_name(modules.activation)
    checked = [
        (module, kind)
        for module, kind in zip(modules, _KINDS, strict=True)
        if module is not None and kind is not nn.Module
    ]
    if activation is None or not are_plain(checked):
        return None
    parts = _parts_of(modules, activation, has_norms)
    if parts is None:
        return None
    return WholeLayer(layer, modules, places + list(_places_within(modules)), parts)


def _place(owner: Any, name: str) -> _Place:
    """Where a module, or any other object, keeps an attribute of its own."""
    tables = [owner.__dict__.get(kind, {}) for kind in ("_parameters", "_modules")]
    found = next((table for table in tables if name in table), owner.__dict__)
    return _Place(found, name)


def _places_within(modules: _Modules) -> Iterator[_Place]:
    """Where `_parts_of` finds things."""
    for norm in (modules.input_norm, modules.post_norm, modules.q_norm, modules.k_norm):
        if norm is not None:
            yield from (_place(norm, name) for name in ("weight", "eps", "weight_offset"))
    for linear in (modules.qkv, modules.output, modules.gate_up, modules.down):
        yield from (_place(linear, "matrix"), _place(linear, "bias"))
        yield _place(linear.matrix, "_stored")
    yield _place(modules.rotary, "is_interleaved")
    yield from (_place(modules.attn, name) for name in ("scaling", "sliding_window", "logit_cap"))
    if "approximate" in vars(modules.activation):
        yield _place(modules.activation, "approximate")


def _parts_of(modules: _Modules, activation: str, has_norms: bool) -> ops.LayerParts | None:
    """What the op takes; None: it does not."""
    q_norm, k_norm, rotary, attn = modules.q_norm, modules.k_norm, modules.rotary, modules.attn
    norms_of_qk = (None, None, 0.0, 0.0)
    if has_norms:
        if (q_norm.eps, q_norm.weight_offset) != (k_norm.eps, k_norm.weight_offset):
            return None
        norms_of_qk = (q_norm.weight, k_norm.weight, q_norm.eps, q_norm.weight_offset)
    linears = [
        _linear_part(linear)
        for linear in (modules.qkv, modules.output, modules.gate_up, modules.down)
    ]
    if None in linears:
        return None
    qkv, output, gate_up, down = linears
    return ops.LayerParts(
        _norm_part(modules.input_norm),
        qkv,
        ops.AttentionPart(
            *norms_of_qk, rotary.is_interleaved, attn.scaling, attn.sliding_window, attn.logit_cap
        ),
        output,
        _norm_part(modules.post_norm),
        gate_up,
        activation,
        down,
    )


def _norm_part(norm: RMSNorm) -> ops.NormPart:
    return ops.NormPart(norm.weight, norm.eps, norm.weight_offset)


def _linear_part(linear: Linear) -> ops.LinearPart | None:
    stored = linear.matrix.stored
    if not isinstance(stored, ops.PackedWeight | ops.QuantizedWeight):
        return None
    return ops.LinearPart.of(stored, linear.bias)
