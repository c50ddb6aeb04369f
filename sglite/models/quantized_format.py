"""What the readers of quantised checkpoints have in common.

A quantised linear layer is several tensors with one prefix: packed codes, scales, zero points. A
reader turns them into codes between -8 and 7 (or -128 and 127), zero points of the same kind and
scales: `weight = (code - zero) * scale`, with groups of neighbouring columns.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
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
        name: the layer's path in the checkpoint, which a model's class may have under another one.
        shape: (rows, columns) of its weight.
        found: the file and entry of each tensor.
    """

    name: str
    shape: tuple[int, int]
    found: Mapping[str, tuple[SafetensorsFile, TensorEntry]]
    # Of tensors that do not lie in the file so that they can be mapped.
    _copies: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)

    @property
    def place(self) -> str:
        """A file that has the layer, and its name: where messages begin."""
        file, _ = next(iter(self.found.values()))
        return f"{file.path}: {self.name}"

    def read(self, suffix: str) -> Tensor:
        """A tensor, valid until `release`."""
        file, entry = self.found[suffix]
        if file.is_mapped(entry):
            return file.read(entry)
        if suffix not in self._copies:  # layers are read rows by rows
            self._copies[suffix] = file.read(entry)
        return self._copies[suffix]

    def release(self) -> None:
        """Gives back the memory of what was read."""
        self._copies.clear()
        for file, entry in self.found.values():
            file.release(entry)

    def check(self, suffix: str, shape: tuple[int, ...], *dtypes: torch.dtype) -> None:
        """Raises CheckpointError unless a tensor is there with this shape and one of the dtypes."""
        wanted = f"{'/'.join(str(d).removeprefix('torch.') for d in dtypes)}{list(shape)}"
        if suffix not in self.found:
            raise CheckpointError(f"{self.place}.{suffix} is missing: expected {wanted}")
        file, entry = self.found[suffix]
        if entry.shape != shape or entry.dtype not in dtypes:
            raise CheckpointError(
                f"{file.path}: {self.name}.{suffix} is {entry.dtype_name}{list(entry.shape)}; "
                f"expected {wanted}"
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
        """Reads the config.

        Raises:
            CheckpointError: a value is of a kind that it cannot have.
            UnsupportedModelError: it asks for something that is not implemented.
        """

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
            f"{tensors.place}: g_idx puts columns into groups that are not of {layout.group_size} "
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


def read_setting(
    format_name: str, values: Mapping[str, Any], setting: str, kind: type, default: Any = None
) -> Any:
    """A value of a `quantization_config`; `default` where it is left out, or null.

    Raises:
        CheckpointError: it is not of `kind`.
    """
    value = values.get(setting)
    if value is None:
        return default
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise CheckpointError(
            f"quantization_config ({format_name}): {setting}={_short(value)} must be {_KINDS[kind]}"
        )
    return value


def read_group_size(format_name: str, values: Mapping[str, Any], setting: str) -> int | None:
    """The inputs of a group, 128 where nothing is said; None: all (-1)."""
    size = read_setting(format_name, values, setting, int, 128)
    if size < 1 and size != -1:
        raise refuse(format_name, setting, size, "a positive number, or -1")
    return None if size == -1 else size


def refuse(format_name: str, setting: str, value: Any, known: str) -> UnsupportedModelError:
    """The error for a setting of a `quantization_config` that is not implemented."""
    return UnsupportedModelError(
        f"quantization_config ({format_name}): {setting}={_short(value)} is not implemented; "
        f"known: {known}"
    )


_KINDS = {int: "a whole number", bool: "true or false", list: "a list", Mapping: "an object"}


def _short(value: Any) -> str:
    return repr(value)[:200]
