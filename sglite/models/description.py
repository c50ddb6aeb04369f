"""What a loaded model is made of, for people to read."""

from collections import Counter
from dataclasses import dataclass, fields
from itertools import groupby

import torch
from torch import nn

from sglite.layers.attention import RadixAttention
from sglite.layers.decoder import DecoderLayer
from sglite.layers.weight import Weight, WeightModule
from sglite.layers.whole_layers import find_whole
from sglite.ops import PackedWeight, QuantizedWeight

_MB = 1 << 20


@dataclass(frozen=True)
class ModelDescription:
    """A model's parts; prints as a table.

    Attributes:
        architecture: name of the model's class.
        code: whose code runs.
        dtype: of hidden states and KV cache.
        attention: the attention layers, equal neighbours in one line.
        fused: what runs as one op, or stands in for a part of the class.
        kept: parts with weights of their own that run as their class has them.
        weights: how matrices are stored.
    """

    architecture: str
    code: str
    dtype: str
    attention: tuple[str, ...]
    fused: tuple[str, ...]
    kept: tuple[str, ...]
    weights: tuple[str, ...]

    def __repr__(self) -> str:
        names = [field.name for field in fields(self)]
        width = max(len(name) for name in names)
        lines = []
        for name in names:
            value = getattr(self, name)
            values = value if isinstance(value, tuple) else (value,)
            for index, line in enumerate(values or ("-",)):
                lines.append(f"  {name if index == 0 else '':<{width}}  {line}")
        return "\n".join(["ModelDescription", *lines])


def describe(model: nn.Module, architecture: str, dtype: str) -> ModelDescription:
    """What a loaded model is made of, and what of it runs as one op.

    Args:
        model: with its weights.
        architecture, dtype: as `ModelDescription` gives them.
    """
    info = getattr(model, "info", None)  # of a model that Hugging Face's class runs
    if info is None:
        code = f"sglite's own layers ({type(model).__module__}.{type(model).__name__})"
    elif info.shared:
        code = "Hugging Face's class, over a live module's parameters"
    else:
        code = "Hugging Face's class"
    return ModelDescription(
        architecture=architecture,
        code=code,
        dtype=dtype,
        attention=tuple(_attention(model)),
        fused=tuple(_fused(model, info)),
        kept=tuple(f"{count} {name}" for name, count in info.fusions.kept.items()) if info else (),
        weights=tuple(_weights(model)),
    )


def _attention(model: nn.Module) -> list[str]:
    """Equal layers that follow each other are one line."""
    layers = [module for module in model.modules() if isinstance(module, RadixAttention)]
    layers.sort(key=lambda layer: layer.layer_id)
    lines = []
    start = 0
    for text, group in groupby(layers, key=_attention_text):
        count = len(list(group))
        stop = start + count - 1
        which = f"layers {start} to {stop}" if count > 1 else f"layer {start}"
        lines.append(f"{which}: {text}")
        start = stop + 1
    return lines


def _attention_text(layer: RadixAttention) -> str:
    text = (
        f"{layer.num_heads} heads, {layer.num_kv_heads} kv heads of {layer.head_dim}, "
        f"scale {layer.scaling:.4g}"
    )
    if layer.sliding_window:
        text += f", window {layer.sliding_window}"
    if layer.logit_cap:
        text += f", soft cap {layer.logit_cap:g}"
    if layer.has_sinks:
        text += ", sinks"
    return text


def _fused(model: nn.Module, info: object | None) -> list[str]:
    lines = []
    layers = [module for module in model.modules() if isinstance(module, DecoderLayer)]
    on_cpu = torch.empty(0)
    whole = sum(find_whole(layer, on_cpu) is not None for layer in layers if _is_on_cpu(layer))
    if whole:
        lines.append(f"{whole} decoder layers, each one op (neighbours in one call)")
    if len(layers) > whole:
        lines.append(f"{len(layers) - whole} decoder layers, part by part in fused ops")
    if info is not None:
        fusions = info.fusions
        lines += [f"{count} x {names} as one product" for names, count in fusions.stacked.items()]
        lines += [f"{count} {kind} by sglite's ops" for kind, count in fusions.counts.items()]
    return lines


def _is_on_cpu(layer: nn.Module) -> bool:
    return next(layer.parameters()).device.type == "cpu"


def _weights(model: nn.Module) -> list[str]:
    """One line for each way in which matrices are stored."""
    matrices = {
        id(module.matrix): module.matrix
        for module in model.modules()
        if isinstance(module, WeightModule)
    }
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for matrix in matrices.values():
        kind = _storage(matrix)
        counts[kind] += 1
        sizes[kind] += matrix.nbytes
    plain = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    if plain:
        kind = "plain, as Hugging Face has them"
        counts[kind] = len(plain)
        sizes[kind] = sum(parameter.nbytes for parameter in plain)
    return [f"{counts[kind]} matrices {kind}, {sizes[kind] / _MB:.1f} MB" for kind in counts]


def _storage(matrix: Weight) -> str:
    stored = matrix.stored
    dtype = str(matrix.dtype).removeprefix("torch.")
    if isinstance(stored, PackedWeight):
        return f"packed for the CPU's kernels in {dtype}"
    if isinstance(stored, QuantizedWeight):
        return f"quantised to int{matrix.layout.bits}"
    return f"plain in {dtype}"
