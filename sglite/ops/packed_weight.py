"""Weights of linear layers in the order in which the kernel reads them."""

import torch
from torch import Tensor

from sglite import _C
from sglite.ops.weight_memory import WeightMemory

PANEL_COLUMNS = 32


class PackedWeight:
    """A weight [n, k] stored in panels of 32 rows (32 output columns of the layer).

    A panel holds its rows transposed, so that one vector load fetches neighbouring output columns:
    `storage` is [ceil(n / 32), k, 32] for float32 and [ceil(n / 32), ceil(k / 2), 32, 2] for
    bfloat16 and float16, whose neighbouring k stay side by side. Rows and columns beyond n and k
    are zero. Packing changes the place of elements, never a bit of them.

    Attributes:
        storage: the tensor with the panels.
        n: rows of the weight (outputs of the layer).
        k: columns of the weight (inputs of the layer).
    """

    __slots__ = ("arguments", "k", "n", "storage")

    def __init__(self, storage: Tensor, n: int, k: int):
        expected = storage_shape(n, k, storage.dtype)
        if tuple(storage.shape) != expected:
            raise ValueError(
                f"PackedWeight: storage: expected shape {list(expected)} for a weight [{n}, {k}] "
                f"of {storage.dtype}, got {list(storage.shape)}"
            )
        self.storage = storage
        self.n = n
        self.k = k
        #: What the kernels take.
        self.arguments = (storage, n, k)

    @classmethod
    def empty(
        cls, n: int, k: int, dtype: torch.dtype, memory: WeightMemory | None = None
    ) -> "PackedWeight":
        """A weight whose rows are still to be written, in memory of its own unless told where."""
        if n < 1 or k < 1:
            raise ValueError(f"PackedWeight: expected n and k of 1 or more, got n={n}, k={k}")
        storage = new_panels(storage_shape(n, k, dtype), dtype, memory)
        if n % PANEL_COLUMNS:
            storage[-1].zero_()
        return cls(storage, n, k)

    @property
    def shape(self) -> torch.Size:
        """The weight's shape, [n, k]."""
        return torch.Size((self.n, self.k))

    @property
    def dtype(self) -> torch.dtype:
        """The type of the elements."""
        return self.storage.dtype

    @property
    def device(self) -> torch.device:
        """Where the storage lies."""
        return self.storage.device

    def write_rows(self, start: int, rows: Tensor) -> None:
        """Sets the rows from `start` on to `rows`, [count, k] of the same dtype.

        Any start and count will do; whole panels (multiples of 32) are fastest. Writers of
        different rows may run at the same time, as long as they share no panel.
        """
        _C.pack_rows(self.storage, self.n, self.k, start, rows)

    def read_rows(self, start: int, stop: int) -> Tensor:
        """The rows from `start` to before `stop`, [stop - start, k]: what was written, bit for bit.

        Raises:
            ValueError: unless 0 <= start <= stop <= n.
        """
        if not 0 <= start <= stop <= self.n:
            raise ValueError(
                f"PackedWeight.read_rows: expected 0 <= start <= stop <= {self.n}, "
                f"got start={start}, stop={stop}"
            )
        rows = torch.empty(stop - start, self.k, dtype=self.dtype)
        _C.unpack_rows(self.storage, self.n, self.k, start, rows)
        return rows

    def unpack(self) -> Tensor:
        """The whole weight, [n, k]."""
        return self.read_rows(0, self.n)

    def __repr__(self) -> str:
        return f"PackedWeight([{self.n}, {self.k}], {self.dtype})"


def new_panels(shape: tuple[int, ...], dtype: torch.dtype, memory: WeightMemory | None) -> Tensor:
    """A tensor for panels, not initialised."""
    if memory is not None:
        return memory.take(shape, dtype)
    panels = torch.empty(shape, dtype=dtype)
    _C.advise_huge_pages(panels)
    return panels


def storage_shape(n: int, k: int, dtype: torch.dtype) -> tuple[int, ...]:
    """The shape of the storage of a packed weight [n, k]."""
    panels = -(-n // PANEL_COLUMNS)
    if dtype == torch.float32:
        return panels, k, PANEL_COLUMNS
    if dtype in (torch.bfloat16, torch.float16):
        return panels, -(-k // 2), PANEL_COLUMNS, 2
    raise ValueError(f"PackedWeight: dtype: expected float32, bfloat16 or float16, got {dtype}")


def pack_weight(weight: Tensor) -> PackedWeight:
    """Packs a plain weight [n, k]; the elements of a row lie side by side."""
    if weight.ndim != 2:
        raise ValueError(f"pack_weight: weight: expected [n, k], got shape {list(weight.shape)}")
    packed = PackedWeight.empty(*weight.shape, weight.dtype)
    packed.write_rows(0, weight)
    return packed
