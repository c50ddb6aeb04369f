"""The matrix behind a linear layer or an embedding, allocated when it is first written.

On the CPU it is packed in the order in which the kernel reads it, and maybe quantised; on a GPU it
lies as the checkpoint has it. Late allocation means that a checkpoint's headers are compared with
the whole model before any memory is taken for it, and that a model is built without knowing the
dtype it will run in.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sglite.ops import (
    PackedWeight,
    QuantizedLayout,
    QuantizedRows,
    QuantizedWeight,
    WeightMemory,
    WeightWriter,
    pack_weight,
)

# Elements of a tensor that are converted to another dtype at a time, so that a large one does not
# stand in memory twice.
_CONVERTED_AT_ONCE = 1 << 20


class Weight:
    """A matrix [rows, columns]; a tied embedding and output head share one.

    Attributes:
        shape: (rows, columns): outputs and inputs of a linear layer.
        dtype: what it is, or will be, stored in.
        device: where it is, or will be, stored.
        name: how messages call it.
        layout: how it is quantised; None: it is not.
        nbytes: what it takes, or will take.
        memory: where it will be allocated on the CPU, beside others; None: by itself.
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
        self.layout: QuantizedLayout | None = None
        self.memory: WeightMemory | None = None
        self._order: Tensor | None = None
        self._stored: PackedWeight | QuantizedWeight | Tensor | tuple[Tensor, ...] | None = None

    @property
    def nbytes(self) -> int:  # noqa: D102
        rows, columns = self.shape
        if self.layout is None:
            return rows * columns * self.dtype.itemsize
        groups = self.layout.num_groups(columns)
        group_bytes = self.layout.scale_dtype.itemsize + self.layout.has_zeros
        return rows * (columns * self.layout.bits // 8 + groups * group_bytes)

    def quantize(self, layout: QuantizedLayout, order: Tensor | None = None) -> None:
        """Stores what is written from now on quantised.

        Args:
            layout: bits, group size and so on.
            order: [columns] int64, where groups are of columns that are no neighbours: the order
                in which they are.

        Raises:
            ValueError: something has been written already, or the layout does not fit.
        """
        if self._stored is not None:
            raise ValueError(f"{self.name or 'a weight'}: it holds a weight already")
        if problem := layout.problem(self.shape[1]):
            raise ValueError(f"{self.name or 'a weight'} {list(self.shape)}: {problem}")
        self.layout, self._order = layout, order

    def borrow(self, segments: Sequence[Tensor]) -> None:
        """Has the ops read plain tensors where they lie, one behind the other.

        Args:
            segments: up to 16, each [its rows, columns], a row's elements side by side.
        """
        self._stored = tuple(segments)

    def adopt(self, stored: PackedWeight | QuantizedWeight) -> None:
        """Has the ops read what is packed already, where it lies; its dtype is the weight's.

        Raises:
            ValueError: it is of another shape.
        """
        if tuple(stored.shape) != self.shape:
            raise ValueError(
                f"{self.name or 'a weight'}: expected {list(self.shape)}, got {list(stored.shape)}"
            )
        self.dtype = stored.dtype
        if isinstance(stored, QuantizedWeight):
            self.layout, self._order = stored.layout, stored.order
        self._stored = stored

    def give_back(self) -> None:
        """Forgets what it has borrowed; it is to be written now."""
        self._stored = None

    @property
    def stored(self) -> PackedWeight | QuantizedWeight | Tensor | tuple[Tensor, ...]:
        """What the ops take."""
        if self._stored is None:
            raise RuntimeError(
                f"{self.name or 'a weight'} {list(self.shape)} is used before it was loaded"
            )
        return self._stored

    def write_rows(self, start: int, rows: Tensor) -> None:
        """Sets the rows from `start` on to `rows`, [count, columns] of any floating-point dtype."""
        stored = self._allocated()
        dtype = self.dtype if self.layout is None else _quantizable(rows.dtype)
        count = max(1, _CONVERTED_AT_ONCE // self.shape[1])
        if rows.dtype == dtype and self._order is None:
            count = max(1, rows.shape[0])
        for begin in range(0, rows.shape[0], count):
            some = rows[begin : begin + count].to(dtype)
            if isinstance(stored, PackedWeight):
                stored.write_rows(start + begin, some)
            elif isinstance(stored, QuantizedWeight):
                some = some if self._order is None else some[:, self._order]
                stored.quantize_rows(start + begin, some)
            else:
                stored[start + begin : start + begin + len(some)].copy_(some)

    def add_rows(self, writer: WeightWriter, start: int, rows: Tensor, *, is_mapped: bool) -> bool:
        """As `write_rows`, once `writer` runs; False where they have to be written right away.

        That is so on a GPU, and where rows are converted or reordered first.
        """
        stored = self._allocated()
        if isinstance(stored, PackedWeight):
            fits = rows.dtype == stored.dtype
        else:
            fits = (
                isinstance(stored, QuantizedWeight)
                and stored.zeros is None
                and self._order is None
                and rows.dtype == _quantizable(rows.dtype)
            )
        if fits:
            writer.add(stored, start, rows, is_mapped=is_mapped)
        return fits

    def write_codes(self, start: int, rows: QuantizedRows) -> None:
        """Sets the rows from `start` on, quantised by `layout`, their columns in `order`."""
        self._allocated().write_rows(start, rows)

    def read_rows(self, start: int, stop: int) -> Tensor:
        """A copy of the rows from `start` to before `stop`, [stop - start, columns].

        Quantised ones as the numbers that they stand for, rounded to `dtype`.
        """
        stored = self.stored
        if isinstance(stored, PackedWeight | QuantizedWeight):
            return stored.read_rows(start, stop)
        if isinstance(stored, tuple):
            return torch.cat(stored)[start:stop]
        return stored[start:stop].clone()

    def convert(self, function: Callable[[Tensor], Tensor]) -> None:
        """Applies a change of dtype or device, as `torch.nn.Module.to` hands it to its tensors."""
        changed = function(torch.empty(0, dtype=self.dtype, device=self.device))
        if (changed.dtype, changed.device) == (self.dtype, self.device):
            return
        stored = self._stored
        if self.layout is not None and changed.device.type != "cpu":
            raise ValueError(
                f"{self.name or 'a weight'}: quantised weights stay on the CPU; {changed.device} "
                f"has no kernel for them"
            )
        self.dtype, self.device = changed.dtype, changed.device
        if stored is None:
            return
        if isinstance(stored, QuantizedWeight):
            stored.dtype = self.dtype
            return
        plain = function(stored.unpack() if isinstance(stored, PackedWeight) else stored)
        self._stored = pack_weight(plain) if self.device.type == "cpu" else plain

    def _allocated(self) -> PackedWeight | QuantizedWeight | Tensor:
        if self._stored is None:
            self._stored = self._allocate()
        return self._stored

    def _allocate(self) -> PackedWeight | QuantizedWeight | Tensor:
        if self.layout is not None:
            return QuantizedWeight.empty(
                *self.shape, self.layout, self.dtype, self._order, self.memory
            )
        if self.device.type == "cpu":
            return PackedWeight.empty(*self.shape, self.dtype, self.memory)
        return torch.empty(self.shape, dtype=self.dtype, device=self.device)

    def __repr__(self) -> str:
        return f"Weight({list(self.shape)}, {self.dtype}, {self.device})"


def _quantizable(dtype: torch.dtype) -> torch.dtype:
    """What rows are converted to before they are quantised: nothing else where that can be."""
    return torch.float32 if dtype == torch.float64 else dtype


class WeightModule(nn.Module):
    """A module whose weight is no parameter, but stored as the kernels of its device read it.

    `module.weight` copies it into a new tensor, the checkpoint's; changing that tensor in place
    changes nothing, assigning one does (`module.weight = module.weight * 2`). Of a quantised
    weight it is what the codes stand for; what is assigned is quantised.

    Args:
        rows: outputs of a linear layer, entries of an embedding.
        columns: inputs of a linear layer, width of an embedding.
        name: module path, for messages.

    Attributes:
        matrix: the stored weight.
        quantized_at_load: whether `LLM(quantization=)` stores layers of this class quantised.
    """

    quantized_at_load: ClassVar[bool] = True

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
