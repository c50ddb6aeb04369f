"""Memory of tensors that are gone, for those to come."""

import weakref
from bisect import bisect_left
from math import prod

import torch
from torch import Tensor

from sglite.ops.weight_memory import aligned_block

# Smaller tensors are left to `malloc`, which keeps what they leave.
_LEAST_SIZE = 1 << 20
_MOST_BLOCKS = 4


class SpareMemory:
    """Hands out large tensors, and takes their memory back when nothing holds them any more.

    `malloc` returns a large block to the system as soon as it is freed, and the system clears
    every page of the next one: for the logits of 32 requests that can be as much work as a tenth
    of the product that they come from. For tensors that are made anew in each step, of about the
    same size.
    """

    def __init__(self):
        self._blocks: list[Tensor] = []

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A contiguous tensor on the CPU, not initialised, from a multiple of 64 bytes on.

        It is an ordinary one: it, and any view of it, may be kept for as long as somebody likes.
        """
        size = prod(shape) * dtype.itemsize
        if size < _LEAST_SIZE:
            return torch.empty(shape, dtype=dtype)
        block = self._take(size)
        # The tensor holds the array, which nobody else does.
        array = block.numpy()
        weakref.finalize(array, _give_back, self._blocks, block).atexit = False
        return torch.from_numpy(array)[:size].view(dtype).view(shape)

    def drop(self) -> None:
        """Returns to the system what is spare."""
        self._blocks.clear()

    @property
    def spare_bytes(self) -> int:
        """How much is held for tensors to come."""
        return sum(map(len, self._blocks))

    def _take(self, size: int) -> Tensor:
        """The smallest spare block that is large enough, or a new one in place of the largest."""
        blocks = sorted(self._blocks, key=len)
        index = bisect_left(blocks, size, key=len)
        if index < len(blocks):
            taken = blocks.pop(index)
        else:
            del blocks[-1:]
            taken = aligned_block(size)
        self._blocks[:] = blocks
        return taken


def _give_back(blocks: list[Tensor], block: Tensor) -> None:
    if len(blocks) < _MOST_BLOCKS:
        blocks.append(block)
