"""Decoder layers of Llama's kind, recognised in a Hugging Face model and run as one op.

A layer is one if its parts are there, each is seen to compute what the library's part computes (in
float32), and the whole gives what the library's `DecoderLayer` gives with the same weights. Only
then is it replaced; a model with one layer that is not is left as it is.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sglite.cache.kv_pool import KVPool, LayerSpec
from sglite.interface.errors import SGLiteError
from sglite.layers.attention import SelfAttention
from sglite.layers.composite import is_plain
from sglite.layers.decoder import DecoderLayer, run_layers
from sglite.layers.forward_batch import ForwardBatch
from sglite.layers.linear import Linear
from sglite.layers.mlp import GatedMLP
from sglite.layers.norm import RMSNorm
from sglite.layers.rotary import RotaryEmbedding
from sglite.models.quantization import layout_at_load
from sglite.models.transformers_attention import RunningBatch
from sglite.models.transformers_parts import packed_linear, rms_norm_like
from sglite.models.transformers_probe import ProbeResult, forward_arguments
from sglite.models.transformers_recorder import AttentionFacts

_ACTIVATIONS = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_pytorch_tanh": lambda x: functional.gelu(x, approximate="tanh"),
}
_LENGTHS = (4, 3)  # tokens of the two sequences that layers are compared on
# What may differ, relative to the largest of what a layer adds: both round in their own places.
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 4e-2}


class LayerRun(nn.Module):
    """Stands for all decoder layers of a model.

    Args:
        layers: in order.
        running: where the batch is found.
        returns_tuple: whether the model's own layers return one.
    """

    def __init__(self, layers: Sequence[DecoderLayer], running: RunningBatch, returns_tuple: bool):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self._running = running
        self._returns_tuple = returns_tuple

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor | tuple[Tensor]:
        """[1, T, hidden_size] -> [1, T, hidden_size]; whatever else a layer takes is not needed."""
        running = self._running
        out = run_layers(self.layers, running.positions, hidden_states[0], running.batch)[None]
        return (out,) if self._returns_tuple else out


class NoAngles(nn.Module):
    """Stands for the rotary embedding of a model whose layers have one of their own."""

    def forward(self, *_: Any, **__: Any) -> None:
        """Gives nothing."""


@dataclass(frozen=True)
class _Parts:
    """The parts of a layer that looks like Llama's."""

    input_norm: nn.Module
    post_norm: nn.Module
    qkv: Sequence[nn.Linear]
    output: nn.Linear
    q_norm: nn.Module | None
    k_norm: nn.Module | None
    gate_up: Sequence[nn.Linear]
    down: nn.Linear
    activation: str


def replace_layers(
    inner: nn.Module,
    found: ProbeResult,
    specs: Sequence[LayerSpec],
    running: RunningBatch,
    device: torch.device,
    quantization: str | None,
) -> int:
    """Replaces a model's decoder layers by the library's if all of them are of Llama's kind.

    Args:
        inner: the Hugging Face model, its attention slots in place, on the CPU.
        found: what the probe has learned.
        specs: the layers of the cache.
        running: where the batch is found.
        device: where the layers are going to run.
        quantization: "int8" or "int4": how weights are stored; None: plainly.

    Returns:
        How many layers were replaced: all or none.
    """
    parent, name = _layer_list(inner, found.layers)
    if parent is None:
        return 0
    layers = list(getattr(parent, name))
    parts = [
        _parts_of(layer, facts, found.calls, inner)
        for layer, facts in zip(layers, found.layers, strict=True)
    ]
    if None in parts:
        return 0
    rotary = _rotary_embedding(inner, found)
    if rotary is None:
        return 0
    module, path = rotary
    inputs, outputs, batch, positions = _run_all(inner, layers, specs, running)
    made = []
    for index, (own, facts) in enumerate(zip(parts, found.layers, strict=True)):
        layer = _decoder_layer(own, facts, index, module)
        with torch.inference_mode():
            result = layer(positions, inputs[index][0], batch)
        expected = outputs[index][0] if isinstance(outputs[index], tuple) else outputs[index]
        if not _alike(result, expected[0], inputs[index][0]):
            return 0
        made.append(layer)
    # Only now, since a layer that is not alike leaves all the others as they are.
    for layer, own in zip(made, parts, strict=True):
        _pack(layer, own, quantization)
    run = LayerRun(made, running, isinstance(outputs[0], tuple)).to(device)
    for attribute in ("attention_type", "layer_type"):
        if hasattr(layers[0], attribute):
            setattr(run, attribute, getattr(layers[0], attribute))
    parent._modules[name] = nn.ModuleList([run])
    owner, _, own_name = path.rpartition(".")
    inner.get_submodule(owner)._modules[own_name] = NoAngles()
    return len(made)


def _layer_list(inner: nn.Module, layers: Sequence[AttentionFacts]) -> tuple[nn.Module | None, str]:
    """Where the list is whose elements hold one attention module each; (None, "") if nowhere."""
    for path, module in inner.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) != len(layers):
            continue
        prefixes = [f"{path}.{index}." for index in range(len(module))]
        if all(
            facts.path.startswith(prefix) for facts, prefix in zip(layers, prefixes, strict=True)
        ):
            owner, _, name = path.rpartition(".")
            return inner.get_submodule(owner), name
    return None, ""


def _parts_of(
    layer: nn.Module, facts: AttentionFacts, calls: Mapping[str, Any], inner: nn.Module
) -> _Parts | None:
    """A layer's parts; None where it is not of Llama's kind."""
    if (
        facts.head_dim != facts.v_head_dim
        or facts.shares is not None
        or facts.has_sinks
        or not is_plain(layer, type(layer))
    ):
        return None
    attention = inner.get_submodule(facts.path)
    base = facts.path.rpartition(".")[0]
    order = {
        name: calls[f"{base}.{name}"].order for name in layer._modules if f"{base}.{name}" in calls
    }
    names = sorted(order, key=order.get)
    if len(names) != 4 or len(layer._modules) != 4:
        return None
    input_norm, own_attention, post_norm, mlp = (layer._modules[name] for name in names)
    if own_attention is not attention or not is_plain(mlp, type(mlp)):
        return None
    heads = dict(attention._modules)
    heads.pop("sglite_attention", None)
    q_norm, k_norm = heads.pop("q_norm", None), heads.pop("k_norm", None)
    qkv, output = (
        _take(heads, ("q_proj", "k_proj", "v_proj"), "qkv_proj"),
        heads.pop("o_proj", None),
    )
    inside = dict(mlp._modules)
    gate_up, down = (
        _take(inside, ("gate_proj", "up_proj"), "gate_up_proj"),
        inside.pop("down_proj", None),
    )
    activation = _activation_of(next(iter(inside.values()))) if len(inside) == 1 else None
    linears = [*qkv, *gate_up, output, down]
    norms = [input_norm, post_norm, *(norm for norm in (q_norm, k_norm) if norm is not None)]
    if (
        heads
        or not qkv
        or not gate_up
        or activation is None
        or (q_norm is None) != (k_norm is None)
        or not all(linear is not None and is_plain(linear, nn.Linear) for linear in linears)
        or not all(rms_norm_like(norm) for norm in norms)
        or len({linear.bias is None for linear in qkv}) != 1
        or len({linear.bias is None for linear in (*gate_up, down)}) != 1
        or not is_plain(attention, type(attention))
    ):
        return None
    return _Parts(input_norm, post_norm, qkv, output, q_norm, k_norm, gate_up, down, activation)


def _take(parts: dict[str, nn.Module], names: Sequence[str], together: str) -> list[nn.Linear]:
    """The linear layers of these names, or the one that is all of them; none: an empty list."""
    if together in parts:
        return [parts.pop(together)]
    if all(name in parts for name in names):
        return [parts.pop(name) for name in names]
    return []


def _activation_of(module: nn.Module) -> str | None:
    """The name of the function that a module computes, by its results in float32."""
    if list(module.parameters()) or not is_plain(module, type(module)):
        return None
    x = torch.linspace(-6, 6, 256)
    with torch.inference_mode():
        y = module(x)
    for name, function in _ACTIVATIONS.items():
        if y.shape == x.shape and torch.allclose(y, function(x), rtol=1e-6, atol=1e-6):
            return name
    return None


def _rotary_embedding(inner: nn.Module, found: ProbeResult) -> tuple[RotaryEmbedding, str] | None:
    """The library's module with the angles of the model's own, and that one's path.

    None where there is none, or more than one, or the angles differ.
    """
    paths = [
        path for path in found.calls if "rotary" in type(inner.get_submodule(path)).__name__.lower()
    ]
    config = inner.config.get_text_config()
    parameters = getattr(config, "rope_parameters", None)
    limit = getattr(config, "max_position_embeddings", None)
    head_dims = {facts.head_dim for facts in found.layers}
    if len(paths) != 1 or not isinstance(parameters, Mapping) or not limit or len(head_dims) != 1:
        return None
    head_dim = head_dims.pop()
    positions = torch.tensor([0, 1, 2, 17, limit // 3, limit - 1])
    with torch.inference_mode():
        angles = inner.get_submodule(paths[0])(torch.zeros(1, 1, head_dim), positions[None])
    if not isinstance(angles, tuple) or len(angles) != 2 or angles[0].shape[:-1] != (1, 6):
        return None
    rotary_dim = angles[0].shape[-1]
    try:
        module = RotaryEmbedding(head_dim, rotary_dim, limit, rope_parameters=parameters)
        module.table.grow_for(positions)
    except (SGLiteError, ValueError, TypeError):  # a kind that the library does not have
        return None
    half = rotary_dim // 2
    expected = torch.cat([part[0, :, :half] for part in angles], -1)
    table = module.table.cos_sin[positions]
    # An angle is position times frequency, whose last bit counts for more at far positions.
    allowed = 1e-4 + 1e-6 * positions[:, None]
    if ((table - expected).abs() > allowed).any():
        return None
    return module, paths[0]


def _run_all(
    inner: nn.Module, layers: Sequence[nn.Module], specs: Sequence[LayerSpec], running: RunningBatch
) -> tuple[list[Tensor], list[Any], ForwardBatch, Tensor]:
    """Every layer's input and output on two short sequences whose positions are far apart."""
    weight = next(inner.parameters())
    pool = KVPool(1 + len(_LENGTHS), 16, specs, weight.dtype, weight.device)
    ends = torch.tensor(_LENGTHS).cumsum(0)
    places = torch.cat([torch.arange(length) for length in _LENGTHS])
    pages = torch.repeat_interleave(torch.arange(1, 1 + len(_LENGTHS)), torch.tensor(_LENGTHS))
    batch = ForwardBatch(
        query_start=functional.pad(ends, (1, 0)).int(),
        kv_lens=torch.tensor(_LENGTHS, dtype=torch.int32),
        kv_end=(places + 1).int(),
        slots=pages * 16 + places,
        page_table=torch.arange(1, 1 + len(_LENGTHS), dtype=torch.int32)[:, None],
        logits_rows=ends - 1,
        kv_cache=pool.layers,
    )
    limit = inner.config.get_text_config().max_position_embeddings
    positions = (places * 37 + pages * 5) % limit
    ids = (torch.arange(len(places)) * 11 + 5) % inner.config.get_text_config().vocab_size
    inputs: list[Tensor] = []
    outputs: list[Any] = []

    def keep(_: nn.Module, args: tuple, kwargs: Mapping[str, Any], output: Any) -> None:
        inputs.append((args[0] if args else kwargs["hidden_states"]).clone())
        outputs.append(output)

    handles = [layer.register_forward_hook(keep, with_kwargs=True) for layer in layers]
    try:
        with torch.inference_mode(), running.of(batch, positions):
            inner(input_ids=ids[None], position_ids=positions[None], **forward_arguments(inner))
    finally:
        for handle in handles:
            handle.remove()
    return inputs, outputs, batch, positions


def _decoder_layer(
    parts: _Parts,
    facts: AttentionFacts,
    layer_id: int,
    rotary: RotaryEmbedding,
) -> DecoderLayer:
    """The library's layer over the weights of `parts`, where they lie."""
    hidden_size = parts.output.out_features
    attention = SelfAttention(
        hidden_size=hidden_size,
        num_heads=facts.num_heads,
        num_kv_heads=facts.num_kv_heads,
        head_dim=facts.head_dim,
        rotary_emb=rotary,
        layer_id=layer_id,
        qkv_bias=parts.qkv[0].bias is not None,
        output_bias=parts.output.bias is not None,
        qk_norm_eps=None if parts.q_norm is None else 1e-6,
        scaling=facts.scaling,
        sliding_window=facts.window,
        prefix=facts.path,
    )
    attention.attn.logit_cap = facts.soft_cap
    if parts.q_norm is not None:
        attention.q_norm, attention.k_norm = _norm(parts.q_norm), _norm(parts.k_norm)
    mlp = GatedMLP(
        hidden_size,
        parts.down.in_features,
        parts.activation,
        bias=parts.down.bias is not None,
        prefix=facts.path,
    )
    layer = DecoderLayer(attention, mlp, _norm(parts.input_norm), _norm(parts.post_norm))
    for linear, own in _linears(layer, parts):
        linear.matrix.borrow([part.weight.detach() for part in own])
        if linear.bias is not None:
            linear.bias.data = torch.cat([part.bias.detach() for part in own])
    return layer.eval()


def _linears(layer: DecoderLayer, parts: _Parts) -> list[tuple[Linear, Sequence[nn.Linear]]]:
    """The layer's linear layers, each with those that it stands for."""
    return [
        (layer.self_attn.qkv_proj, parts.qkv),
        (layer.self_attn.o_proj, [parts.output]),
        (layer.mlp.gate_up_proj, parts.gate_up),
        (layer.mlp.down_proj, [parts.down]),
    ]


def _pack(layer: DecoderLayer, parts: _Parts, quantization: str | None) -> None:
    """Packs a layer's weights one after the other, and drops the plain ones."""
    for linear, own in _linears(layer, parts):
        matrix, dtype = linear.matrix, own[0].weight.dtype
        matrix.give_back()
        matrix.convert(lambda tensor, dtype=dtype: tensor.to(dtype))
        if quantization is not None:
            matrix.quantize(layout_at_load(matrix, quantization))
        packed_linear(linear, [part.weight for part in own], [part.bias for part in own])
        for part in own:
            part._parameters["weight"] = None


def _norm(part: nn.Module) -> RMSNorm:
    eps, offset = rms_norm_like(part)
    norm = RMSNorm(part.weight.shape[0], eps, offset)
    norm.weight = nn.Parameter(part.weight.detach(), requires_grad=False)
    return norm


def _alike(actual: Tensor, expected: Tensor, before: Tensor) -> bool:
    """Whether two layers add the same to what they were given, but for rounding."""
    added = expected.float() - before.float()
    error = (actual.float() - expected.float()).abs().max()
    return bool(error <= _TOLERANCE.get(expected.dtype, 1e-4) * added.abs().max())
