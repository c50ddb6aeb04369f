"""What a processor gives for a prompt with images: pixels, and where in the prompt they go."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sglite.interface.errors import RequestError


class ProcessedMedia(NamedTuple):
    """One image or video as the model takes it; see `MultimodalItem`."""

    modality: str
    pixel_values: Tensor
    num_tokens: int
    data: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class MultimodalItem:
    """One image or video, and the span of the prompt's tokens that it stands in.

    Attributes:
        modality: "image" or "video".
        pixel_values: what the family's vision tower takes, with its shape and dtype. None where
            they have been given up; the model never sees such an item.
        start, stop: the span; the model gives a row of embeddings for each token in it.
        data: what else the model needs of it: "grid_thw" (time, height and width of the grid of
            patches), say. Tensors, and plain values.
        digest: 16 bytes that tell it from every other one: of the pixels, the modality and `data`.
            The same file processed for another size is another picture.
    """

    modality: str
    pixel_values: Tensor | None
    start: int
    stop: int
    data: Mapping[str, Any] = field(default_factory=dict)
    digest: bytes = b""

    def __post_init__(self):
        if not self.digest:
            object.__setattr__(self, "digest", _digest(self))

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt that stand for it."""
        return self.stop - self.start


@dataclass(frozen=True, eq=False)
class MultimodalInputs:
    """All images and videos of one prompt.

    Attributes:
        items: in the order of their spans, which do not overlap.
        positions: [3, num_prompt_tokens] int64, the rows time, height and width of M-RoPE; None
            where positions simply count.
        position_offset: what to add to a position behind the prompt, where there are `positions`.
        whole_spans: whether the tokens of a span see each other both ways: then a span is computed
            in one step, and taken out of the cache whole or not at all.
        remake: makes the pixels again, one tensor for each item; None where that cannot be done.
    """

    items: Sequence[MultimodalItem]
    positions: NDArray[np.int64] | None = None
    position_offset: int = 0
    whole_spans: bool = False
    remake: Callable[[], Sequence[Tensor]] | None = None

    @property
    def num_pixel_bytes(self) -> int:
        """What the pixels take that are there."""
        pixels = (item.pixel_values for item in self.items)
        return sum(tensor.nbytes for tensor in pixels if tensor is not None)

    def without_pixels(self) -> "MultimodalInputs":
        """The same without pixels."""
        if all(item.pixel_values is None for item in self.items):
            return self
        return replace(self, items=[replace(item, pixel_values=None) for item in self.items])

    def emptied(self) -> "MultimodalInputs":
        """The same without pixels and what these could be made of."""
        return replace(self.without_pixels(), remake=None)

    def released(self) -> "MultimodalInputs":
        """The same without pixels where these can be made again."""
        return self if self.remake is None else self.without_pixels()

    def restored(self) -> "MultimodalInputs":
        """The same with pixels.

        Raises:
            RequestError: they have been given up, and come out differently now.
        """
        made = self.remake()
        items = [
            replace(item, pixel_values=pixels, digest=b"")
            for item, pixels in zip(self.items, made, strict=True)
        ]
        if [item.digest for item in items] != [item.digest for item in self.items]:
            raise RequestError("an image has other pixels when it is read again")
        return replace(self, items=items)

    def overlapping(self, start: int, stop: int) -> list[MultimodalItem]:
        """The items that have tokens among the positions `start` to before `stop`."""
        return [item for item in self.items if item.start < stop and item.stop > start]

    def rope_positions(self, start: int, stop: int) -> NDArray[np.int64]:
        """[3, stop - start]: the rows of M-RoPE, also of tokens behind the prompt."""
        count = self.positions.shape[1]
        behind = np.arange(max(start, count), max(stop, count)) + self.position_offset
        return np.concatenate(
            [self.positions[:, start:stop], np.broadcast_to(behind, (3, len(behind)))], axis=1
        )

    def span_around(self, position: int) -> tuple[int, int] | None:
        """The span that begins before `position` and ends behind it, if there is one."""
        for item in self.items:
            if item.start < position < item.stop:
                return item.start, item.stop
        return None


def _digest(item: MultimodalItem) -> bytes:
    digest = blake2b(item.modality.encode(), digest_size=16)
    _add(digest, item.pixel_values)
    for name, value in sorted(item.data.items()):
        digest.update(name.encode())
        _add(digest, value)
    return digest.digest()


def _add(digest: Any, value: Any) -> None:
    """Adds a value so that no two different ones look alike: with its kind and shape."""
    if not isinstance(value, Tensor):
        digest.update(repr(value).encode() + b"\0")
        return
    digest.update(f"{value.dtype} {tuple(value.shape)}\0".encode())
    digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
