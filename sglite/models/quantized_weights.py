"""Filling a model's matrices from the tensors of quantised layers."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sglite.interface.errors import CheckpointError, UnsupportedModelError
from sglite.layers.weight import Weight
from sglite.models.quantized_format import QuantizedFormat, QuantizedTensors, column_order
from sglite.models.safetensors_file import SafetensorsFile, TensorEntry
from sglite.models.targets import Target
from sglite.ops import QuantizedLayout

# Elements that are unpacked at a time, in whole panels of 32 rows.
_UNPACKED_AT_ONCE = 1 << 20
_PANEL_ROWS = 32


@dataclass(frozen=True)
class QuantizedPart:
    """A quantised layer of the checkpoint, and the rows of a matrix that it fills.

    Attributes:
        target: the rows.
        tensors: the layer's tensors.
        layout: how they are quantised.
        order: the order of columns in which groups are neighbours; None: they are.
    """

    target: Target
    tensors: QuantizedTensors
    layout: QuantizedLayout
    order: Tensor | None

    def write(self, quantized: QuantizedFormat) -> None:
        """Fills the rows: codes where the matrix stores such, else the numbers they stand for."""
        weight: Weight = self.target.tensor
        count, columns = self.tensors.shape
        step = max(1, _UNPACKED_AT_ONCE // columns // _PANEL_ROWS) * _PANEL_ROWS
        for start in range(0, count, step):
            rows = quantized.rows(self.tensors, start, min(start + step, count))
            if self.order is not None:
                rows = replace(rows, codes=rows.codes[:, self.order])
            if weight.layout is None:
                plain = rows.dequantize(self.layout.group_size)
                if self.order is not None:
                    plain = torch.empty_like(plain).index_copy_(-1, self.order, plain)
                weight.write_rows(self.target.start + start, plain)
                continue
            zeros = rows.zeros if weight.layout.has_zeros else None
            weight.write_codes(self.target.start + start, replace(rows, zeros=zeros))
        self.tensors.release()


def take_quantized(
    targets: Mapping[str, Target],
    found: dict[str, tuple[SafetensorsFile, TensorEntry]],
    quantized: QuantizedFormat,
) -> dict[str, QuantizedPart]:
    """The layers that are quantised, by the name that their plain weight would have.

    Args:
        targets: all places of the model.
        found: all tensors of the checkpoint; those of the layers are taken out, and biases of
            zeros where the model has none, which some writers add.
        quantized: how to read them.

    Raises:
        CheckpointError: a tensor is not what the config says, or missing.
        UnsupportedModelError: a layer is quantised in a way that is not implemented.
    """
    parts = {}
    for name, target in targets.items():
        path = name.removesuffix(".weight")
        marker = found.get(f"{path}.{quantized.marker}")
        if not isinstance(target.tensor, Weight) or marker is None:
            continue
        names = {suffix: f"{path}.{suffix}" for suffix in quantized.suffixes}
        tensors = QuantizedTensors(
            marker[1].name.removesuffix(f".{quantized.marker}"),
            (target.shape[0], target.tensor.shape[1]),
            {suffix: found.pop(full) for suffix, full in names.items() if full in found},
        )
        if name in found:
            raise CheckpointError(f"{tensors.place} is there twice: quantised, and as it was")
        layout = quantized.layout(tensors)
        if problem := layout.problem(tensors.shape[1]):
            raise UnsupportedModelError(f"{tensors.place}: {problem} is not implemented")
        order = column_order(tensors, layout, quantized.group_indices(tensors))
        tensors.release()
        parts[name] = QuantizedPart(target, tensors, layout, order)
        _drop_empty_bias(f"{path}.bias", targets, found)
    _check_single(targets, found, parts)
    return parts


def _drop_empty_bias(
    name: str,
    targets: Mapping[str, Target],
    found: dict[str, tuple[SafetensorsFile, TensorEntry]],
) -> None:
    if name in found and name not in targets:
        file, entry = found[name]
        if entry.dtype is not None and not file.read(entry).float().any():
            del found[name]


def _check_single(
    targets: Mapping[str, Target], found: Iterable[str], parts: Mapping[str, QuantizedPart]
) -> None:
    """A place is filled once: tied matrices cannot be quantised apart from one another."""
    others = {targets[name].key: name for name in found if name in targets}
    for name, part in parts.items():
        other = others.setdefault(part.target.key, name)
        if other != name:
            raise CheckpointError(
                f"{part.tensors.place} is quantised apart from {other}, with which config.json "
                f"ties it: such a checkpoint must say that tie_word_embeddings is false"
            )


def choose_layouts(targets: Mapping[str, Target], parts: Mapping[str, QuantizedPart]) -> None:
    """Has matrices store codes if all that goes into them is quantised alike.

    A stacked layer of which a part is left out, say, stores the numbers that codes stand for.
    """
    places: dict[int, set[tuple[int, int]]] = defaultdict(set)
    for target in targets.values():
        places[id(target.tensor)].add(target.key)
    by_weight: dict[int, list[QuantizedPart]] = defaultdict(list)
    for part in parts.values():
        by_weight[id(part.target.tensor)].append(part)
    for key, own in by_weight.items():
        has_zeros = any(part.layout.has_zeros for part in own)
        layouts = {replace(part.layout, has_zeros=has_zeros) for part in own}
        if len(own) == len(places[key]) and len(layouts) == 1 and _same_order(own):
            own[0].target.tensor.quantize(layouts.pop(), own[0].order)


def _same_order(parts: list[QuantizedPart]) -> bool:
    first = parts[0].order
    if first is None:
        return all(part.order is None for part in parts)
    return all(part.order is not None and torch.equal(part.order, first) for part in parts)
