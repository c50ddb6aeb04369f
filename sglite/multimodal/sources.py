"""Pictures as they are kept to be processed once more: small, and out of the caller's hands."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from sglite.multimodal.images import Fetcher, read_image


class Fetched(dict[str, bytes]):
    """A fetcher that remembers what it has fetched.

    Args:
        fetch: the caller's.
    """

    def __init__(self, fetch: Fetcher):
        super().__init__()
        self._fetch = fetch

    def __call__(self, url: str) -> bytes:
        """The bytes of the file behind a URL."""
        self[url] = bytes(self._fetch(url))
        return self[url]


class Sources:
    """What the pixels of a prompt's pictures can be made of again.

    A file is kept as its bytes, anything else as a copy of the picture, since the caller may change
    a file, an array or an image as soon as the call has begun.

    Args:
        images: as the caller gave them.
        pictures: what `read_image` made of them.
        fetched: of those that are URLs.
        process: makes pixels of pictures, a tensor for each.

    Attributes:
        num_bytes: what all of it takes.
    """

    def __init__(
        self,
        images: Sequence[Any],
        pictures: Sequence[Image.Image],
        fetched: Mapping[str, bytes],
        process: Callable[[Sequence[Image.Image]], Sequence[Tensor]],
    ):
        self._process = process
        self._kept = [
            _kept(image, picture, fetched) for image, picture in zip(images, pictures, strict=True)
        ]
        self.num_bytes = sum(
            kept.width * kept.height * 3 if isinstance(kept, Image.Image) else len(kept)
            for kept in self._kept
        )

    def pixels(self) -> Sequence[Tensor]:
        """The pixels once more, one tensor for each picture."""
        return self._process([read_image("an image", kept) for kept in self._kept])


def _kept(image: Any, picture: Image.Image, fetched: Mapping[str, bytes]) -> Any:
    if isinstance(image, bytes | bytearray | memoryview):
        return bytes(image)
    if isinstance(image, str):
        if image in fetched:
            return fetched[image]
        if image[:5].lower() == "data:":
            return image
    if isinstance(image, str | os.PathLike):
        try:
            return Path(image).expanduser().read_bytes()
        except OSError:  # a file: URL, or gone by now
            pass
    return picture.copy()
