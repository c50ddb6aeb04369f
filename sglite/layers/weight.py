"""The matrix behind a linear layer or an embedding: packed, and allocated when it is first written.

Late allocation means that a checkpoint's headers are compared with the whole model before any
memory is taken for it, and that a model is built without knowing the dtype it will run in.
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
        self.name = name
        self._packed: PackedWeight | None = None

    @property
    def is_written(self) -> bool:
        """Whether any rows have been written."""
        return self._packed is not None

    @property
    def packed(self) -> PackedWeight:
        """What the ops take."""
        if self._packed is None:
            raise RuntimeError(
                f"{self.name or 'a weight'} {list(self.shape)} is used before it was loaded"
            )
        return self._packed

    def write_rows(self, start: int, rows: Tensor) -> None:
        """Sets the rows from `start` on to `rows`, [count, columns] of any floating-point dtype."""
        if self._packed is None:
            self._packed = PackedWeight.empty(*self.shape, self.dtype)
        if rows.dtype == self.dtype:
            self._packed.write_rows(start, rows)
            return
        count = max(1, _CONVERTED_AT_ONCE // self.shape[1])
        for begin in range(0, rows.shape[0], count):
            some = rows[begin : begin + count].to(self.dtype)
            self._packed.write_rows(start + begin, some)

    def read_rows(self, start: int, stop: int) -> Tensor:
        """A copy of the rows from `start` to before `stop`, [stop - start, columns]."""
        return self.packed.read_rows(start, stop)

    def convert(self, function: Callable[[Tensor], Tensor]) -> None:
        """Applies a change of dtype or device, as `torch.nn.Module.to` hands it to its tensors."""
        changed = function(torch.empty(0, dtype=self.dtype))
        if changed.dtype == self.dtype:
            return
        self.dtype = changed.dtype
        if self._packed is not None:
            self._packed = pack_weight(self._packed.unpack().to(self.dtype))

    def __repr__(self) -> str:
        return f"Weight({list(self.shape)}, {self.dtype})"


class PackedModule(nn.Module):
    """A module whose weight is no parameter, but packed in the order in which the kernel reads it.

    `module.weight` unpacks it into a new tensor, the checkpoint's; changing that tensor in place
    changes nothing, assigning one does (`module.weight = module.weight * 2`).

    Args:
        rows: outputs of a linear layer, entries of an embedding.
        columns: inputs of a linear layer, width of an embedding.
        name: module path, for messages.

    Attributes:
        matrix: the packed weight.
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

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedModule":
        self.matrix.convert(fn)
        return super()._apply(fn, recurse)
