"""Decoder layers as one op: on the CPU, while all of their parts are plain.

What the op takes of a layer is gathered once and kept, with a snapshot of what it was gathered of.
While that holds, a step takes no look at a layer by itself.
"""

from collections.abc import Callable, Iterator, Sequence
from operator import is_
from typing import Any, NamedTuple

from torch import Tensor, nn

from sglite import ops
from sglite.layers.attention import RadixAttention, SelfAttention
from sglite.layers.composite import are_plain, runs_only
from sglite.layers.forward_batch import ForwardBatch
from sglite.layers.linear import GateUpLinear, Linear, QKVLinear
from sglite.layers.mlp import GatedMLP, op_name
from sglite.layers.norm import RMSNorm
from sglite.layers.rotary import RotaryEmbedding
from sglite.layers.snapshot import Place, Snapshot

# Where a layer, and a list of layers, keep it.
_KEPT = "_whole_layer"
_KEPT_RUN = "_whole_run"


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


def find_whole_run(
    layers: nn.ModuleList, hidden_states: Tensor, forward: Callable
) -> "WholeRun | None":
    """All layers as `run_whole` takes them; None where not all of them can be run so.

    Args:
        layers: the list.
        hidden_states: what the first is to be run on.
        forward: what calling a layer has to run, and nothing else.
    """
    run = layers.__dict__.get(_KEPT_RUN)
    if run is not None and not hidden_states.is_cuda and run.is_of(layers, forward):
        return run
    wholes = []
    for layer in layers:
        whole = find_whole(layer, hidden_states) if runs_only(layer, forward) else None
        if whole is None:
            break
        wholes.append(whole)
    run = WholeRun(layers, wholes) if 0 < len(wholes) == len(layers) else None
    layers.__dict__[_KEPT_RUN] = run
    return run


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

    def calls() -> list[ops.LayerCall]:
        return [layer.call(positions, forward_batch.kv_cache) for layer in layers]

    return _run(layers, calls, positions, hidden_states, forward_batch)


def _run(
    layers: Sequence["WholeLayer"],
    calls: Callable[[], Sequence[ops.LayerCall]],
    positions: Tensor,
    hidden_states: Tensor,
    forward_batch: ForwardBatch,
    rows: Tensor | None = None,
) -> Tensor:
    def run() -> Tensor:
        rotary_rows, _ = layers[0].rotary.rows_and_table(positions)
        return ops.decoder_layers(
            hidden_states.contiguous(),
            forward_batch.layer_batch(rotary_rows),
            calls(),
            forward_batch.scratch,
            rows,
        )

    try:
        return run()
    except IndexError:  # a position that is new to a table of angles
        for layer in layers:
            layer.rotary.table.grow_for(positions)
        return run()


class WholeLayer:
    """What was gathered of a layer.

    Args:
        layer: the layer.
        modules: its parts, all of them plain.
        places: where everything lies that `parts` is made of, and the modules.
        parts: what the op takes.

    Attributes:
        parts: the same.
        rotary, attn: of the modules the two that the op does not replace altogether.
        snapshot: of what the layer is made of.
    """

    def __init__(
        self, layer: nn.Module, modules: "_Modules", places: list[Place], parts: ops.LayerParts
    ):
        self.parts = parts
        self.rotary = modules.rotary
        self.attn = modules.attn
        self.snapshot = Snapshot(places, list(modules.present()))
        self._children = layer._modules

    def is_of(self, layer: nn.Module) -> bool:
        """Whether gathering anew would give the same."""
        return layer._modules is self._children and self.snapshot.holds()

    def call(self, positions: Tensor, kv_cache: Sequence[tuple[Tensor, Tensor]]) -> ops.LayerCall:
        """What the op takes for one run over this cache, at these positions, [T] or [3, T]."""
        _, cos_sin = self.rotary.rows_and_table(positions)
        return ops.LayerCall(self.parts, cos_sin, *kv_cache[self.attn.layer_id])

    def __reduce__(self) -> tuple[type[None], tuple]:
        """A copy of the layer, which has other tables, starts with nothing."""
        return type(None), ()


class WholeRun:
    """All layers of a list, each of which is whole.

    Args:
        layers: the list.
        wholes: of each of its layers.
    """

    def __init__(self, layers: nn.ModuleList, wholes: Sequence[WholeLayer]):
        self._wholes = tuple(wholes)
        self._rotaries = {whole.rotary for whole in wholes}
        self._children = layers._modules
        self._kinds = set(map(type, layers))
        places = [Place(self._children, key) for key in self._children]
        places += [Place(vars(layer), "_modules") for layer in layers]
        own = Snapshot(places, list(layers))
        self._snapshot = Snapshot.of_all([own, *(whole.snapshot for whole in wholes)])

    def is_of(self, layers: nn.ModuleList, forward: Callable) -> bool:
        """Whether looking at each layer anew, one by one, would give the same."""
        return (
            layers._modules is self._children
            and len(self._children) == len(self._wholes)
            and all(kind.forward is forward for kind in self._kinds)
            and self._snapshot.holds()
        )

    def run(
        self,
        positions: Tensor,
        hidden_states: Tensor,
        forward_batch: ForwardBatch,
        rows: Tensor | None,
    ) -> Tensor:
        """What the layers give, see `run_whole`; where there are rows, [R] int64, only these."""

        def calls() -> ops.LayerCalls:
            return self._calls(positions, forward_batch)

        return _run(self._wholes, calls, positions, hidden_states, forward_batch, rows)

    def _calls(self, positions: Tensor, forward_batch: ForwardBatch) -> ops.LayerCalls:
        """What the op takes, the same for a batch while its tables of angles are the same."""
        tables = [rotary.rows_and_table(positions)[1] for rotary in self._rotaries]
        # By the list: of the runs that there have been of it, only the last one's are kept.
        kept = forward_batch.layer_calls.get(id(self._children))
        if kept is None or kept.run is not self or not all(map(is_, tables, kept.tables)):
            calls = ops.LayerCalls(
                whole.call(positions, forward_batch.kv_cache) for whole in self._wholes
            )
            kept = forward_batch.layer_calls[id(self._children)] = _Calls(self, tables, calls)
        return kept.calls

    def __reduce__(self) -> tuple[type[None], tuple]:
        """As of `WholeLayer`."""
        return type(None), ()


class _Calls(NamedTuple):
    """What the op takes of a run's layers, with these tables of angles."""

    run: WholeRun
    tables: Sequence[Tensor]
    calls: ops.LayerCalls


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
        Place(layer._modules, "self_attn"),
        Place(layer._modules, "mlp"),
        Place(layer._modules, "input_layernorm"),
        Place(layer._modules, "post_attention_layernorm"),
        *(Place(attention._modules, name) for name in ("qkv_proj", "rotary_emb", "attn")),
        Place(attention._modules, "o_proj"),
        *(Place(mlp._modules, name) for name in ("gate_up_proj", "down_proj", "act_fn")),
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


def _place(owner: Any, name: str) -> Place:
    """Where a module, or any other object, keeps an attribute of its own."""
    tables = [owner.__dict__.get(kind, {}) for kind in ("_parameters", "_modules")]
    found = next((table for table in tables if name in table), owner.__dict__)
    return Place(found, name)


def _places_within(modules: _Modules) -> Iterator[Place]:
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
