"""Pictures in every form in which a caller may have them, read as Pillow images."""

import base64
import binascii
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes, urlparse
from urllib.request import url2pathname

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps

from sglite.interface import checks
from sglite.interface.errors import InvalidRequestError

#: Pixels of a picture at most: Pillow's own limit, beyond which it takes a file for an attack. (It
#: warns from half of it on, which is between it and the host.)
MAX_PIXELS = 2 * 89_478_485

#: What files may be, by Pillow's names: formats that it decodes within the process. It knows more,
#: such as EPS, for which it starts Ghostscript.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")

# A file of this many pixels may be as small as it likes.
_FREE_PIXELS = 1 << 24
# Beyond, a byte stands for so many at most: deflate packs up to 1032 bytes of 8 pixels into one.
_PIXELS_PER_BYTE = 1032 * 8

#: Gives the bytes of the file behind a http(s) URL.
Fetcher = Callable[[str], bytes]

_FORMS = (
    "a PIL image, a path, the bytes of a file, a data: URL, or a numpy array or torch tensor of "
    "[height, width, 3] or [3, height, width]"
)


def read_image(name: str, image: Any, fetch: Fetcher | None = None) -> Image.Image:
    """A picture as RGB, turned upright by its EXIF orientation.

    Transparency and other modes are treated as Hugging Face does it: what comes as a file is read
    as by its `load_image`, where alpha is dropped; a PIL image or an array as by its image
    processors, where it lies on white.

    Args:
        name: how messages call it.
        image: a PIL image; a path (a string or `pathlib.Path`) or a `file:` URL; the bytes of a
            file; a `data:` URL; a numpy array or torch tensor, [height, width],
            [height, width, 1 | 3 | 4] or [1 | 3 | 4, height, width], of uint8 or of floats from 0
            to 1; or a http(s) URL, if there is a fetcher.
        fetch: gives the bytes behind a http(s) URL; None: such URLs are refused.

    Raises:
        InvalidRequestError: it is none of these, no image, broken, empty or too large.
    """
    if isinstance(image, Image.Image):
        _check_size(name, *image.size)
        return _from_pillow(name, image)
    if isinstance(image, torch.Tensor):
        tensor = image.detach().cpu()
        image = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
    if isinstance(image, np.ndarray):
        return _from_pillow(name, Image.fromarray(_pixels(name, image)))
    if isinstance(image, bytes | bytearray | memoryview):
        return _from_file(name, io.BytesIO(bytes(image)), f"the {len(image)} bytes given")
    if isinstance(image, os.PathLike):
        return _from_path(name, Path(image))
    if isinstance(image, str):
        return _from_string(name, image, fetch)
    checks.refuse(name, image, _FORMS)


def read_frames(name: str, video: Any, fetch: Fetcher | None = None) -> list[Image.Image]:
    """The frames of a video, all of one size.

    Args:
        name: how messages call it.
        video: a list of images, or an array of [frames, ...] whose entries are such.
        fetch: as for `read_image`.

    Raises:
        InvalidRequestError: it is no list, has no frame, or frames of different sizes.
    """
    is_array = isinstance(video, np.ndarray | torch.Tensor) and video.ndim == 4
    if not (is_array or isinstance(video, list | tuple)):
        checks.refuse(
            name, video, "a list of frames, each an image: video files are not decoded here"
        )
    frames = [read_image(f"{name}[{index}]", frame, fetch) for index, frame in enumerate(video)]
    if not frames:
        raise InvalidRequestError(f"{name} is a video without a frame")
    sizes = {frame.size for frame in frames}
    if len(sizes) > 1:
        found = ", ".join(f"{width} x {height}" for width, height in sorted(sizes))
        raise InvalidRequestError(f"{name} has frames of different sizes: {found}")
    return frames


def _from_string(name: str, text: str, fetch: Fetcher | None) -> Image.Image:
    scheme = urlparse(text).scheme.lower() if ":" in text[:16] else ""
    if scheme == "data":
        return _from_file(name, io.BytesIO(_data_of_url(name, text)), "the data: URL")
    if scheme in ("http", "https"):
        if fetch is None:
            raise InvalidRequestError(
                f"{name}={checks.shorten(text)} is not allowed: nothing is fetched from the "
                f"network here. Pass LLM(..., image_fetcher=f), where f(url) gives the bytes of "
                f"the file, or fetch it yourself"
            )
        return _from_file(name, io.BytesIO(_fetched(name, text, fetch)), checks.shorten(text))
    if scheme == "file":
        return _from_path(name, Path(url2pathname(urlparse(text).path)))
    return _from_path(name, Path(text).expanduser())


def _fetched(name: str, url: str, fetch: Fetcher) -> bytes:
    try:
        return bytes(fetch(url))
    except Exception as error:  # whatever the caller's own function raises
        raise InvalidRequestError(
            f"{name}: the fetcher failed for {checks.shorten(url)}: {type(error).__name__}: {error}"
        ) from error


def _data_of_url(name: str, url: str) -> bytes:
    head, comma, data = url.partition(",")
    if not comma:
        raise InvalidRequestError(f"{name} is a data: URL without a comma, and so without data")
    if not head.rstrip().endswith(";base64"):
        return unquote_to_bytes(data)
    try:
        return base64.b64decode("".join(data.split()), validate=True)
    except binascii.Error as error:
        raise InvalidRequestError(f"{name} is a data: URL with broken base64: {error}") from error


def _from_path(name: str, path: Path) -> Image.Image:
    try:
        if not path.is_file():
            kind = "is a folder" if path.is_dir() else "does not exist"
            raise InvalidRequestError(f"{name}: the file {checks.shorten(str(path))} {kind}")
        with path.open("rb") as file:
            return _from_file(name, file, str(path))
    except (OSError, ValueError) as error:
        if isinstance(error, InvalidRequestError):
            raise
        raise InvalidRequestError(
            f"{name}: the file {checks.shorten(str(path))} cannot be read: "
            f"{getattr(error, 'strerror', None) or error}"
        ) from error


def _from_file(name: str, file: Any, what: str) -> Image.Image:
    num_bytes = file.seek(0, io.SEEK_END)
    file.seek(0)
    try:
        image = Image.open(file, formats=_formats())
        _check_size(name, *image.size)
        _check_density(name, what, image, num_bytes)
        image.load()
        # In place, as a large picture need not be held twice.
        ImageOps.exif_transpose(image, in_place=True)
        return image if image.mode == "RGB" else image.convert("RGB")
    except Image.UnidentifiedImageError:
        raise InvalidRequestError(
            f"{name}: {what} is no image of a format that is read here: {', '.join(_formats())}"
        ) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InvalidRequestError(f"{name}: {what} is too large an image: {error}") from error
    except InvalidRequestError:
        raise
    except Exception as error:  # decoders raise what they please on a broken file
        raise InvalidRequestError(
            f"{name}: {what} is a broken or truncated image: {type(error).__name__}: {error}"
        ) from error


def _formats() -> list[str]:
    """Those of `FORMATS` that this version of Pillow has."""
    Image.init()
    return [kind for kind in FORMATS if kind in Image.OPEN]


def _check_density(name: str, what: str, image: Image.Image, num_bytes: int) -> None:
    """Refuses a small file that would become a large picture, before memory is taken for it."""
    width, height = image.size
    most = max(_FREE_PIXELS, num_bytes * _PIXELS_PER_BYTE)
    if width * height > most:
        raise InvalidRequestError(
            f"{name}: {what} announces {width} x {height} pixels in {num_bytes} bytes, which no "
            f"picture of anything has; at most {most:,} pixels are believed of it: scale it down"
        )


def _from_pillow(name: str, image: Image.Image) -> Image.Image:
    try:
        image.load()
        if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
            image = ImageOps.exif_transpose(image)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, (255, 255, 255, 255))
            image = Image.alpha_composite(white, image)
        return image if image.mode == "RGB" else image.convert("RGB")
    except Exception as error:  # a file that is read only now
        raise InvalidRequestError(
            f"{name} is a broken or truncated image: {type(error).__name__}: {error}"
        ) from error


def _pixels(name: str, array: np.ndarray) -> np.ndarray:
    """uint8 [height, width] or [height, width, 3 | 4] of an array in any of the forms."""
    shape = list(array.shape)
    if array.ndim == 3 and array.shape[2] not in (1, 3, 4) and array.shape[0] in (1, 3, 4):
        array = np.moveaxis(array, 0, 2)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim != 2 and not (array.ndim == 3 and array.shape[2] in (3, 4)):
        raise InvalidRequestError(
            f"{name} is an array {shape}, but an image is [height, width], [height, width, 3] or "
            f"[3, height, width]"
        )
    _check_size(name, array.shape[1], array.shape[0])
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * 255
    if np.issubdtype(array.dtype, np.floating):
        if not (array.min() >= 0.0 and array.max() <= 1.0):  # also where there is NaN
            raise InvalidRequestError(
                f"{name} is an array of {array.dtype} with values from {array.min():g} to "
                f"{array.max():g}: floats must be from 0 to 1 (or pass uint8, from 0 to 255)"
            )
        array = np.rint(array * 255.0)
    elif array.dtype != np.uint8 and not (
        np.issubdtype(array.dtype, np.integer) and array.min() >= 0 and array.max() <= 255
    ):
        raise InvalidRequestError(
            f"{name} is an array of {array.dtype}, but pixels must be whole numbers from 0 to 255, "
            f"or floats from 0 to 1"
        )
    return np.ascontiguousarray(array, np.uint8)


def _check_size(name: str, width: int, height: int) -> None:
    if width < 1 or height < 1:
        raise InvalidRequestError(f"{name} is an image of {width} x {height} pixels: it is empty")
    if width * height > MAX_PIXELS:
        raise InvalidRequestError(
            f"{name} is an image of {width} x {height} pixels, more than the {MAX_PIXELS:,} that "
            f"are allowed: scale it down"
        )
