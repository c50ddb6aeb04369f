"""The matrix behind a linear layer or an embedding, allocated when it is first written.

On the CPU it is packed in the order in which the kernel reads it; on a GPU it lies as the
checkpoint has it. Late allocation means that a checkpoint's headers are compared with the whole
model before any memory is taken for it, and that a model is built without knowing the dtype it will
run in.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sglite.ops import PackedWeight, pack_weight

# Elements of a tensor that are converted to another dtype at a time, so that a large one does not
# stand in memory twice.
_CONVERTED_AT_ONCE = 1 << 22


class Weight:
    """A matrix [rows, columns]; a tied embedding and output head share one.

    Attributes:
        shape: (rows, columns): outputs and inputs of a linear layer.
        dtype: what it is, or will be, stored in.
        device: where it is, or will be, stored.
        name: how messages call it.
    """

    def __init__(self, rows: int, columns: int, name: str):
        if rows < 1 or columns < 1:
            raise ValueError(
                f"{name or 'a weight'}: expected rows and columns of 1 or more, got "
                f"[{rows}, {columns}]"
            )
        self.shape = (rows, columns)
        self.dtype = torch.get_default_dtype()
        self.device = torch.device("cpu")
        self.name = name
        self._stored: PackedWeight | Tensor | None = None

    @property
    def is_written(self) -> bool:
        """Whether any rows have been written."""
        return self._stored is not None

    @property
    def stored(self) -> PackedWeight | Tensor:
        """What the ops take."""
        if self._stored is None:
            raise RuntimeError(
                f"{self.name or 'a weight'} {list(self.shape)} is used before it was loaded"
            )
        return self._stored

    def write_rows(self, start: int, rows: Tensor) -> None:
        """Sets the rows from `start` on to `rows`, [count, columns] of any floating-point dtype."""
        if self._stored is None:
            self._stored = self._allocate()
        count = max(1, _CONVERTED_AT_ONCE // self.shape[1])
        if rows.dtype == self.dtype:
            count = rows.shape[0]
        for begin in range(0, rows.shape[0], max(1, count)):
            some = rows[begin : begin + count].to(self.dtype)
            if isinstance(self._stored, PackedWeight):
                self._stored.write_rows(start + begin, some)
            else:
                self._stored[start + begin : start + begin + len(some)].copy_(some)

    def read_rows(self, start: int, stop: int) -> Tensor:
        """A copy of the rows from `start` to before `stop`, [stop - start, columns]."""
        stored = self.stored
        if isinstance(stored, PackedWeight):
            return stored.read_rows(start, stop)
        return stored[start:stop].clone()

    def convert(self, function: Callable[[Tensor], Tensor]) -> None:
        """Applies a change of dtype or device, as `torch.nn.Module.to` hands it to its tensors."""
        changed = function(torch.empty(0, dtype=self.dtype, device=self.device))
        if (changed.dtype, changed.device) == (self.dtype, self.device):
            return
        stored = self._stored
        self.dtype, self.device = changed.dtype, changed.device
        if stored is None:
            return
        plain = function(stored.unpack() if isinstance(stored, PackedWeight) else stored)
        self._stored = pack_weight(plain) if self.device.type == "cpu" else plain

    def _allocate(self) -> PackedWeight | Tensor:
        if self.device.type == "cpu":
            return PackedWeight.empty(*self.shape, self.dtype)
        return torch.empty(self.shape, dtype=self.dtype, device=self.device)

    def __repr__(self) -> str:
        return f"Weight({list(self.shape)}, {self.dtype}, {self.device})"


class WeightModule(nn.Module):
    """A module whose weight is no parameter, but stored as the kernels of its device read it.

    `module.weight` copies it into a new tensor, the checkpoint's; changing that tensor in place
    changes nothing, assigning one does (`module.weight = module.weight * 2`).

    Args:
        rows: outputs of a linear layer, entries of an embedding.
        columns: inputs of a linear layer, width of an embedding.
        name: module path, for messages.

    Attributes:
        matrix: the stored weight.
    """

    def __init__(self, rows: int, columns: int, name: str):
        super().__init__()
        self.matrix = Weight(rows, columns, name)

    @property
    def weight(self) -> Tensor:
        """A copy of the weight, [rows, columns], as a checkpoint holds it."""
        return self.matrix.read_rows(0, self.matrix.shape[0])

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "weight":
            super().__setattr__(name, value)
            return
        # Before torch's own way, which would make a parameter of a `torch.nn.Parameter`.
        if tuple(value.shape) != self.matrix.shape:
            raise ValueError(
                f"weight: expected shape {list(self.matrix.shape)}, got {list(value.shape)}"
            )
        self.matrix.write_rows(0, value.detach())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "WeightModule":
        self.matrix.convert(fn)
        return super()._apply(fn, recurse)
