"""What the readers of quantised checkpoints have in common.

A quantised linear layer is several tensors with one prefix: packed codes, scales, zero points. A
reader turns them into codes between -8 and 7 (or -128 and 127), zero points of the same kind and
scales: `weight = (code - zero) * scale`, with groups of neighbouring columns.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from sglite.interface.errors import CheckpointError, UnsupportedModelError
from sglite.models.safetensors_file import SafetensorsFile, TensorEntry
from sglite.ops import QuantizedLayout, QuantizedRows


@dataclass(frozen=True)
class QuantizedTensors:
    """The tensors of one quantised layer, by the last part of their names.

    Attributes:
        name: the layer's path in the checkpoint.
        shape: (rows, columns) of its weight.
        found: the file and entry of each tensor.
    """

    name: str
    shape: tuple[int, int]
    found: Mapping[str, tuple[SafetensorsFile, TensorEntry]]

    def read(self, suffix: str) -> Tensor:
        """A tensor, over the mapped file."""
        file, entry = self.found[suffix]
        return file.read(entry)

    def release(self) -> None:
        """Gives back the memory of the pages that were read."""
        for file, entry in self.found.values():
            file.release(entry)

    def check(self, suffix: str, shape: tuple[int, ...], *dtypes: torch.dtype) -> None:
        """Raises CheckpointError unless a tensor is there with this shape and one of the dtypes."""
        wanted = f"{'/'.join(str(d).removeprefix('torch.') for d in dtypes)}{list(shape)}"
        if suffix not in self.found:
            raise CheckpointError(f"tensor {self.name}.{suffix} is missing: expected {wanted}")
        file, entry = self.found[suffix]
        if entry.shape != shape or entry.dtype not in dtypes:
            raise CheckpointError(
                f"{file.path}: tensor {self.name}.{suffix} is {entry.dtype_name}"
                f"{list(entry.shape)}; expected {wanted}"
            )

    def dtype(self, suffix: str) -> torch.dtype:
        """What a tensor holds."""
        return self.found[suffix][1].dtype


class QuantizedFormat(ABC):
    """One way of storing quantised layers; made from a checkpoint's `quantization_config`.

    Attributes:
        marker: the tensor that says that a layer is quantised.
        suffixes: all that may belong to such a layer.
    """

    marker: ClassVar[str]
    suffixes: ClassVar[tuple[str, ...]]

    @classmethod
    @abstractmethod
    def from_config(cls, values: Mapping[str, Any]) -> "QuantizedFormat":
        """Reads the config. Raises UnsupportedModelError for what is not implemented."""

    @abstractmethod
    def layout(self, tensors: QuantizedTensors) -> QuantizedLayout:
        """How a layer is quantised; checks the tensors' headers. Reads zero points at most.

        Raises:
            CheckpointError: they are not what the config says.
            UnsupportedModelError: the layer is of a kind that is not implemented.
        """

    @abstractmethod
    def rows(self, tensors: QuantizedTensors, start: int, stop: int) -> QuantizedRows:
        """The rows of the weight from `start` to before `stop`; `start` a multiple of 32."""

    def group_indices(self, tensors: QuantizedTensors) -> Tensor | None:
        """The group of each column, [columns]; None: neighbours, in order."""
        return None


def column_order(
    tensors: QuantizedTensors, layout: QuantizedLayout, groups: Tensor | None
) -> Tensor | None:
    """The order of columns in which those of a group are neighbours; None: they are already.

    Raises:
        UnsupportedModelError: the groups are not of the layout's size each.
    """
    if groups is None:
        return None
    in_order = torch.arange(tensors.shape[1]) // layout.group_size
    if torch.equal(groups.long(), in_order):
        return None
    order = torch.argsort(groups, stable=True)
    if not torch.equal(groups[order].long(), in_order):
        raise UnsupportedModelError(
            f"{tensors.name}: g_idx puts columns into groups that are not of {layout.group_size} "
            f"columns each, which is not implemented"
        )
    return order


def unpack_codes(words: Tensor, bits: int) -> Tensor:
    """The unsigned codes in 32-bit words, lowest bits first: [..., w] -> [..., w * 32 / bits]."""
    octets = words.contiguous().view(torch.uint8)
    if bits == 8:
        return octets
    return torch.stack((octets & 15, octets >> 4), -1).flatten(-2)


def signed(codes: Tensor, bits: int) -> Tensor:
    """Unsigned codes around half of their range: 0 becomes -8, or -128; int8."""
    if bits == 8:
        return (codes ^ 128).view(torch.int8)
    return codes.view(torch.int8) - 8


def refuse(format_name: str, setting: str, value: Any, known: str) -> UnsupportedModelError:
    """The error for a setting of a `quantization_config` that is not implemented."""
    return UnsupportedModelError(
        f"quantization_config ({format_name}): {setting}={value!r} is not implemented; known: "
        f"{known}"
    )
