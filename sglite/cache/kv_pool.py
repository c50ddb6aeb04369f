"""The tensors that hold keys and values, page by page."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sglite import ops


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """What one attention layer stores for each token: a key and a value for every KV head."""

    num_kv_heads: int
    head_dim: int

    def __post_init__(self):
        for name in ("num_kv_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 1 or more")

    def bytes_per_token(self, dtype: torch.dtype) -> int:
        """Bytes of one token's key and value."""
        return 2 * self.num_kv_heads * self.head_dim * dtype.itemsize


class KVPool:
    """Keys and values of all layers, in pages that `PrefixCache` gives out.

    The memory is not initialised, except for the reserved page 0, to which padded rows write and
    from which they read; on the CPU the system backs it only as it is written to. A page may
    therefore hold anything, NaN too, in slots that its request has not written: attention must
    select the positions it may see before it multiplies, since 0 * NaN is NaN.

    A slot is `page * page_size + offset`.

    Args:
        num_pages: pages in all, the reserved ones included.
        page_size: tokens in a page.
        layers: one entry for each attention layer; they may differ.
        dtype: of keys and values.
        device: where they lie.

    Attributes:
        layers: per layer (keys, values), each
            [num_pages, page_size, num_kv_heads, head_dim]; empty once closed.
        bytes_per_token: keys and values of all layers.

    Raises:
        ValueError: num_pages or page_size below 1, or no layer.
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        layers: Sequence[LayerSpec],
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ):
        if num_pages < 1:
            raise ValueError(f"num_pages is {num_pages}; it must be 1 or more")
        if page_size < 1:
            raise ValueError(f"page_size is {page_size}; it must be 1 or more")
        if not layers:
            raise ValueError("layers is empty; a model without attention needs no pages")
        self.num_pages = num_pages
        self.page_size = page_size
        self.dtype = dtype
        self.device = torch.device(device)
        self.bytes_per_token = sum(layer.bytes_per_token(dtype) for layer in layers)
        self.layers: list[tuple[Tensor, Tensor]] = []
        for layer in layers:
            shape = (num_pages, page_size, layer.num_kv_heads, layer.head_dim)
            pair = (
                torch.empty(shape, dtype=dtype, device=self.device),
                torch.empty(shape, dtype=dtype, device=self.device),
            )
            for tensor in pair:
                tensor[0].zero_()
            self.layers.append(pair)

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors; 0 once closed."""
        return sum(tensor.nbytes for pair in self.layers for tensor in pair)

    def copy_slots(
        self, source_slots: Sequence[int] | Tensor, destination_slots: Sequence[int] | Tensor
    ) -> None:
        """`slot[destination_slots[i]] = slot[source_slots[i]]` in every layer, for copy on write.

        All sources are read before the first destination is written, so the two may overlap.
        Destinations must differ from each other. On a GPU it is enqueued on the current stream,
        which nothing waits for.

        Args:
            source_slots: [n] integers.
            destination_slots: [n] integers.

        Raises:
            ValueError: lengths that differ.
            IndexError: a slot that does not exist; a tensor on a GPU is not looked into.
            RuntimeError: the pool is closed.
        """
        if not self.layers:
            raise RuntimeError("copy_slots: the KV pool is closed")
        source = torch.as_tensor(source_slots, dtype=torch.int64)
        destination = torch.as_tensor(destination_slots, dtype=torch.int64)
        if source.ndim != 1 or source.shape != destination.shape:
            raise ValueError(
                f"copy_slots: source_slots has shape {list(source.shape)} and destination_slots "
                f"{list(destination.shape)}; both must be [n]"
            )
        num_slots = self.num_pages * self.page_size
        for name, slots in (("source_slots", source), ("destination_slots", destination)):
            if slots.device.type == "cpu" and ((slots < 0) | (slots >= num_slots)).any():
                raise IndexError(f"copy_slots: {name} must be from 0 to {num_slots - 1}")
        ops.copy_kv_slots(
            [tensor for pair in self.layers for tensor in pair],
            source.to(self.device, non_blocking=True),
            destination.to(self.device, non_blocking=True),
        )

    def close(self) -> None:
        """Drop the tensors. Their memory is free as soon as nobody else refers to them."""
        self.layers.clear()
