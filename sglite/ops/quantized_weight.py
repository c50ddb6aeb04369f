"""Quantised weights of linear layers in the order in which the kernel reads them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sglite import _C
from sglite.ops.packed_weight import PANEL_COLUMNS, new_panels
from sglite.ops.weight_memory import WeightMemory

#: Values of k in one step of a panel; groups are multiples of it.
STEP_DEPTH = 8
#: The largest group, unless one group is the whole of k.
LARGEST_GROUP = 256
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class QuantizedLayout:
    """How the rows of a weight [n, k] are quantised.

    Attributes:
        bits: of a code, 4 or 8.
        group_size: how many neighbouring k of a row share a scale; k or more: all of them.
        has_zeros: whether each group has a zero point.
        scale_dtype: of the scales.
    """

    bits: int
    group_size: int
    has_zeros: bool = False
    scale_dtype: torch.dtype = torch.float32

    def num_groups(self, k: int) -> int:
        """Groups of a row of k elements; the last may be smaller."""
        return -(-k // self.group_size)

    def problem(self, k: int) -> str | None:
        """What is wrong with it for rows of k elements; None: nothing."""
        if self.bits not in (4, 8):
            return f"codes of {self.bits} bits (expected 4 or 8)"
        several = self.num_groups(k) > 1
        if several and (self.group_size % STEP_DEPTH or self.group_size > LARGEST_GROUP):
            return (
                f"group size {self.group_size} (expected a multiple of {STEP_DEPTH}, at most "
                f"{LARGEST_GROUP}, or one group for the whole of a row)"
            )
        if self.scale_dtype not in _FLOATS:
            return f"scales of {self.scale_dtype} (expected float32, bfloat16 or float16)"
        return None


@dataclass(frozen=True)
class QuantizedRows:
    """Rows of a quantised weight: `row[j] = (codes[j] - zeros[g]) * scales[g]`, g the group of j.

    Attributes:
        codes: [count, k] int8, any strides; -8 to 7 where there are 4 bits.
        scales: [count, groups].
        zeros: [count, groups] int8; None: all zero.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None = None

    def dequantize(self, group_size: int) -> Tensor:
        """The rows as numbers, [count, k] float32."""
        k = self.codes.shape[1]
        spread = torch.arange(k, device=self.codes.device) // group_size
        codes = self.codes.float()
        if self.zeros is not None:
            codes -= self.zeros.float()[:, spread]
        return codes.mul_(self.scales.float()[:, spread])


class QuantizedWeight:
    """A weight [n, k] as whole numbers of 4 or 8 bits with a scale for each group of a row.

    Panels are as those of `PackedWeight`, and a step holds 8 values of k: `codes` is
    [ceil(n / 32), ceil(k / 8), 8, 32] int8 for 8 bits, and [ceil(n / 32), ceil(k / 8), 32] int32
    for 4 bits, each word 8 nibbles. Rows beyond n are zero. The CPU alone takes it.

    Attributes:
        codes: the tensor with the panels.
        scales: [ceil(n / 32), groups, 32].
        zeros: like `scales`, int8; None where the layout has none.
        layout: bits, group size and so on.
        order: [k] int64 where columns are stored in another order, as groups of columns that are
            no neighbours need: stored column i is the weight's column `order[i]`. None: as they
            are.
        n: rows of the weight (outputs of the layer).
        k: columns of the weight (inputs of the layer).
        dtype: what x has to be, and what the weight reads back as.

    Raises:
        ValueError: the layout does not fit, or a tensor is not as said above.
    """

    __slots__ = ("arguments", "codes", "dtype", "k", "layout", "n", "order", "scales", "zeros")

    def __init__(
        self,
        codes: Tensor,
        scales: Tensor,
        zeros: Tensor | None,
        layout: QuantizedLayout,
        n: int,
        k: int,
        dtype: torch.dtype,
        order: Tensor | None = None,
    ):
        expected = quantized_shapes(n, k, layout)
        given = {"codes": codes, "scales": scales, "zeros": zeros, "order": order}
        for name, (shape, kind) in expected.items():
            tensor = given[name]
            found = None if tensor is None else (tuple(tensor.shape), tensor.dtype)
            if found != (shape, kind):
                raise ValueError(
                    f"QuantizedWeight [{n}, {k}]: {name}: expected {list(shape)} of {kind}, got "
                    f"{'none' if found is None else f'{list(found[0])} of {found[1]}'}"
                )
        if zeros is not None and not layout.has_zeros:
            raise ValueError(f"QuantizedWeight [{n}, {k}]: zeros: the layout has no zero points")
        self.codes = codes
        self.scales = scales
        self.zeros = zeros
        self.layout = layout
        self.order = order
        self.n = n
        self.k = k
        self.dtype = dtype
        #: What the kernels take.
        self.arguments = (codes, scales, zeros, n, k, layout.group_size)

    @classmethod
    def empty(
        cls,
        n: int,
        k: int,
        layout: QuantizedLayout,
        dtype: torch.dtype,
        order: Tensor | None = None,
        memory: WeightMemory | None = None,
    ) -> "QuantizedWeight":
        """A weight whose rows are still to be written; its codes lie in `memory` if given."""
        shapes = quantized_shapes(n, k, layout)
        codes = new_panels(*shapes["codes"], memory)
        if n % PANEL_COLUMNS:
            codes[-1].zero_()
        scales, zeros = (
            torch.zeros(shapes[name][0], dtype=shapes[name][1]) if name in shapes else None
            for name in ("scales", "zeros")
        )
        return cls(codes, scales, zeros, layout, n, k, dtype, order)

    @property
    def shape(self) -> torch.Size:
        """The weight's shape, [n, k]."""
        return torch.Size((self.n, self.k))

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and zero points."""
        zeros = 0 if self.zeros is None else self.zeros.nbytes
        return self.codes.nbytes + self.scales.nbytes + zeros

    def write_rows(self, start: int, rows: QuantizedRows) -> None:
        """Sets the rows from `start` on; their columns are in the stored order."""
        _C.pack_codes(self.arguments, start, rows.codes)
        self._write_by_column(self.scales, start, rows.scales)
        if self.zeros is not None:
            zeros = torch.zeros(1, 1) if rows.zeros is None else rows.zeros
            self._write_by_column(self.zeros, start, zeros.expand(rows.scales.shape))
        elif rows.zeros is not None:
            raise ValueError("QuantizedWeight.write_rows: zeros: the weight has no zero points")

    def quantize_rows(self, start: int, rows: Tensor) -> None:
        """Rounds rows to the nearest codes, symmetric around zero, group by group.

        With 8 bits a group's largest element becomes 127; with 4 bits, where one code more is worth
        something, it becomes -8, whatever its sign: the scale takes it. (The latter as GGML's
        Q4_0.) Scales are rounded to their dtype before they are used.

        Args:
            start: the first row to set.
            rows: [count, k] of float32, bfloat16 or float16, finite, in the stored order of
                columns; a row's elements side by side.
        """
        _C.quantize_rows(self.arguments, start, rows)
        if self.zeros is not None:
            self._write_by_column(
                self.zeros, start, torch.zeros(1, 1).expand(rows.shape[0], self.zeros.shape[1])
            )

    @staticmethod
    def _write_by_column(panels: Tensor, start: int, values: Tensor) -> None:
        """values: [count, groups], into [panels, groups, 32]."""
        rows = torch.arange(start, start + values.shape[0])
        panels[rows // PANEL_COLUMNS, :, rows % PANEL_COLUMNS] = values.to(panels.dtype)

    def read_rows(self, start: int, stop: int) -> Tensor:
        """The rows from `start` to before `stop` as numbers, [stop - start, k] of `dtype`.

        They are worked out in float32 and rounded once.

        Raises:
            ValueError: unless 0 <= start <= stop <= n.
        """
        if not 0 <= start <= stop <= self.n:
            raise ValueError(
                f"QuantizedWeight.read_rows: expected 0 <= start <= stop <= {self.n}, "
                f"got start={start}, stop={stop}"
            )
        rows = torch.empty(stop - start, self.k, dtype=self.dtype)
        _C.read_quantized_rows(self.arguments, start, rows)
        return self.in_columns_order(rows)

    def in_columns_order(self, rows: Tensor) -> Tensor:
        """Rows [..., k] in the stored order of columns, brought into the weight's."""
        if self.order is None:
            return rows
        return torch.empty_like(rows).index_copy_(-1, self.order, rows)

    def unpack(self) -> Tensor:
        """The whole weight as numbers, [n, k] of `dtype`."""
        return self.read_rows(0, self.n)

    def __repr__(self) -> str:
        return (
            f"QuantizedWeight([{self.n}, {self.k}], {self.layout.bits} bits, group size "
            f"{min(self.layout.group_size, self.k)}, {self.dtype})"
        )


def quantized_shapes(
    n: int, k: int, layout: QuantizedLayout
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of the tensors that a quantised weight [n, k] consists of.

    Raises:
        ValueError: there is no such weight.
    """
    if n < 1 or k < 1:
        raise ValueError(f"QuantizedWeight: expected n and k of 1 or more, got n={n}, k={k}")
    if problem := layout.problem(k):
        raise ValueError(f"QuantizedWeight [{n}, {k}]: {problem}")
    panels, steps = -(-n // PANEL_COLUMNS), -(-k // STEP_DEPTH)
    groups = (panels, layout.num_groups(k), PANEL_COLUMNS)
    shapes = {"scales": (groups, layout.scale_dtype)}
    if layout.bits == 8:
        shapes["codes"] = (panels, steps, STEP_DEPTH, PANEL_COLUMNS), torch.int8
    else:
        shapes["codes"] = (panels, steps, PANEL_COLUMNS), torch.int32
    if layout.has_zeros:
        shapes["zeros"] = groups, torch.int8
    return shapes


def quantize_weight(weight: Tensor, layout: QuantizedLayout) -> QuantizedWeight:
    """Quantises a plain weight [n, k] of float32, bfloat16 or float16."""
    if weight.ndim != 2:
        raise ValueError(
            f"quantize_weight: weight: expected [n, k], got shape {list(weight.shape)}"
        )
    quantized = QuantizedWeight.empty(*weight.shape, layout, weight.dtype)
    quantized.quantize_rows(0, weight)
    return quantized
