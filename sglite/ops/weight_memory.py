"""Memory for weights: in huge pages where the system has them, or a file's."""

from math import prod
from threading import Thread

import torch
from torch import Tensor

from sglite import _C

_HUGE_PAGE = 2 << 20
_CACHE_LINE = 64
_BLOCK = 64 << 20  # above what an allocator keeps for itself: freed memory goes to the system


class WeightMemory:
    """Hands out tensors that lie side by side in blocks of huge pages.

    A matrix alone has a part of a huge page at each end, and a small one nothing else: clearing
    those small pages one by one takes longer than packing what goes into them, and reading them
    misses the processor's table of pages. What is not handed out is never touched, so that the
    system does not back it. A block lives as long as any tensor in it.
    """

    def __init__(self):
        self._block = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor on the CPU, not initialised, from a multiple of 64 bytes on."""
        size = prod(shape) * dtype.itemsize
        if self._used + size > len(self._block):
            self._block = aligned_block(max(_BLOCK, size))
            self._used = 0
        taken = self._block[self._used : self._used + size]
        self._used += -(-size // _CACHE_LINE) * _CACHE_LINE
        return taken.view(dtype).view(shape)


def aligned_block(size: int) -> Tensor:
    """`size` bytes from the start of a huge page on, rounded up to whole ones."""
    size = -(-size // _HUGE_PAGE) * _HUGE_PAGE
    raw = torch.empty(size + _HUGE_PAGE, dtype=torch.uint8)
    start = -raw.data_ptr() % _HUGE_PAGE
    block = raw[start : start + size]
    _C.advise_huge_pages(block)
    return block


def map_pages(contents: Tensor) -> None:
    """Begins to map a file's pages, which would else be done as each is first read.

    A thread does it, without the interpreter, while something else takes time; it holds on to the
    tensor and ends by itself.

    Args:
        contents: a tensor over a mapped file.
    """
    Thread(target=_C.map_pages, args=(contents,), name="sglite-map-pages", daemon=True).start()
