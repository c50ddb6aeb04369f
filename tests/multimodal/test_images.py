"""Pictures in every form: what is read, and what is refused and how."""

import base64
import io
import struct
import subprocess
import threading
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image
from transformers.image_transforms import convert_to_rgb
from transformers.image_utils import load_image

from sglite.interface.errors import InvalidRequestError
from sglite.multimodal.images import FORMATS, MAX_PIXELS, read_frames, read_image
from tests.fuzz_loader import peak_memory
from tests.vision_checkpoints import picture

PICTURE = picture(31, 17, 5)


def pixels(image):
    return np.asarray(image)


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.fixture
def path(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(PICTURE))
    return tmp_path / "a.png"


FORMS = {
    "pil": lambda path: PICTURE,
    "path": lambda path: path,
    "string": str,
    "file url": lambda path: path.as_uri(),
    "bytes": lambda path: encoded(PICTURE),
    "bytearray": lambda path: bytearray(encoded(PICTURE)),
    "data url": lambda path: "data:image/png;base64," + base64.b64encode(encoded(PICTURE)).decode(),
    "numpy": lambda path: pixels(PICTURE),
    "numpy channels first": lambda path: pixels(PICTURE).transpose(2, 0, 1),
    "numpy int64": lambda path: pixels(PICTURE).astype(np.int64),
    "numpy float": lambda path: pixels(PICTURE) / 255,
    "torch": lambda path: torch.tensor(pixels(PICTURE)),
    "torch float": lambda path: torch.tensor(pixels(PICTURE)).permute(2, 0, 1) / 255,
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_pixels(form, path):
    image = read_image("x", FORMS[form](path))
    assert image.mode == "RGB"
    assert np.array_equal(pixels(image), pixels(PICTURE))


def modes():
    grey = PICTURE.convert("L")
    alpha = PICTURE.copy()
    alpha.putalpha(grey)
    deep = Image.fromarray((pixels(grey).astype(np.uint16) * 257) >> 3)
    return {
        "grey": grey,
        "alpha": alpha,
        "grey and alpha": alpha.convert("LA"),
        "palette": PICTURE.convert("P"),
        "16 bits": deep,
        "one bit": PICTURE.convert("1"),
    }


@pytest.mark.parametrize("mode", modes())
def test_other_modes_are_treated_as_hugging_face_does(mode, tmp_path):
    image = modes()[mode]
    expected = convert_to_rgb(image, return_numpy=True)
    assert np.array_equal(pixels(read_image("x", image)), expected)
    (tmp_path / "a.png").write_bytes(encoded(image))
    expected = pixels(load_image(str(tmp_path / "a.png")))
    assert np.array_equal(pixels(read_image("x", tmp_path / "a.png")), expected)


def test_arrays_with_alpha_or_one_channel():
    grey = pixels(PICTURE.convert("L"))
    for array in (grey, grey[:, :, None], grey[None]):
        assert np.array_equal(pixels(read_image("x", array))[:, :, 1], grey)
    alpha = modes()["alpha"]
    expected = convert_to_rgb(alpha, return_numpy=True)
    assert np.array_equal(pixels(read_image("x", pixels(alpha))), expected)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_a_picture_upright(orientation, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = tmp_path / "a.png"
    PICTURE.save(file, exif=exif)
    expected = pixels(load_image(str(file)))
    assert (expected.shape[0] > expected.shape[1]) == (orientation > 4)
    assert np.array_equal(pixels(read_image("x", file)), expected)
    assert np.array_equal(pixels(read_image("x", Image.open(file))), expected)


def test_urls_need_a_fetcher():
    url = "https://example.com/a.png"
    with pytest.raises(InvalidRequestError, match=r"images\[0\].*example.com.*image_fetcher"):
        read_image("images[0]", url)
    asked = []

    def fetch(url):
        asked.append(url)
        return encoded(PICTURE)

    assert np.array_equal(pixels(read_image("x", url, fetch)), pixels(PICTURE))
    assert asked == [url]

    def broken(url):
        raise OSError("no route")

    with pytest.raises(InvalidRequestError, match="fetcher failed.*OSError: no route"):
        read_image("x", url, broken)


def refused():
    png = encoded(picture(64, 64, 1))
    jpeg = encoded(picture(64, 64, 1), "JPEG")
    large = Image.new("1", (20_000, 20_000))
    return {
        "no image": (b"hello", "no image"),
        "nothing": (b"", "no image"),
        "truncated png": (png[: len(png) // 2], "broken or truncated"),
        "truncated jpeg": (jpeg[: len(jpeg) // 2], "broken or truncated"),
        "large": (large, "20000 x 20000"),
        "large file": (encoded(large), "20000|too large"),
        "large array": (np.broadcast_to(np.uint8(0), (20_000, 20_000, 3)), "20000 x 20000"),
        "empty": (Image.new("RGB", (0, 5)), "0 x 5.*empty"),
        "empty array": (np.zeros((4, 0, 3), np.uint8), "empty"),
        "no file": ("no/such/file.png", "does not exist"),
        "long text": ("x" * 5000, "cannot be read|does not exist"),
        "folder": (".", "is a folder"),
        "broken base64": ("data:image/png;base64,@@", "base64"),
        "data without data": ("data:image/png", "without data"),
        "not finite": (np.full((4, 4, 3), np.nan), "from 0 to 1"),
        "floats up to 255": (pixels(PICTURE).astype(np.float32), "from 0 to 1"),
        "uint16": (np.full((4, 4, 3), 300, np.uint16), "from 0 to 255"),
        "batch": (np.zeros((2, 4, 4, 3), np.uint8), "4, 4, 3"),
        "two channels": (np.zeros((5, 4, 2), np.uint8), "5, 4, 2"),
        "number": (5, "a PIL image"),
        "none": (None, "a PIL image"),
    }


@pytest.mark.parametrize("case", refused())
def test_what_is_no_picture_is_refused_by_name(case):
    image, message = refused()[case]
    with pytest.raises(InvalidRequestError, match=message) as caught:
        read_image("images[3]", image)
    assert "images[3]" in str(caught.value)
    assert len(str(caught.value)) < 400


def test_the_limit_is_pillows_own():
    assert MAX_PIXELS == 2 * Image.MAX_IMAGE_PIXELS


def test_frames_are_of_one_size():
    frames = read_frames("x", [PICTURE, pixels(PICTURE)])
    assert [np.array_equal(pixels(frame), pixels(PICTURE)) for frame in frames] == [True, True]
    assert len(read_frames("x", np.stack([pixels(PICTURE)] * 3))) == 3
    with pytest.raises(InvalidRequestError, match="without a frame"):
        read_frames("x", [])
    with pytest.raises(InvalidRequestError, match="31 x 17, 32 x 17"):
        read_frames("x", [PICTURE, picture(32, 17)])
    with pytest.raises(InvalidRequestError, match=r"x\[1\].*no image"):
        read_frames("x", [PICTURE, b"?"])
    with pytest.raises(InvalidRequestError, match="not decoded here"):
        read_frames("x", "film.mp4")


def test_formats_for_which_pillow_starts_programs_are_not_read(monkeypatch):
    started = []

    def start(*arguments, **keywords):
        started.append(arguments)
        raise OSError("no program")

    monkeypatch.setattr(EpsImagePlugin, "gs_binary", "gs")
    monkeypatch.setattr(subprocess, "Popen", start)
    eps = encoded(PICTURE, "EPS")
    with pytest.raises(OSError, match="no program"):
        Image.open(io.BytesIO(eps)).load()
    assert len(started) == 1
    with pytest.raises(InvalidRequestError, match="no image of a format.*: PNG, JPEG, WEBP"):
        read_image("x", eps)
    assert len(started) == 1


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_of_the_list_is_read(kind):
    data = encoded(PICTURE, kind)
    expected = Image.open(io.BytesIO(data)).convert("RGB")
    assert np.array_equal(pixels(read_image("x", data)), pixels(expected))


@pytest.mark.parametrize("kind", ["ICO", "TGA", "PCX", "PDF", "SGI"])
def test_no_other_format_is_read(kind):
    with pytest.raises(InvalidRequestError, match="no image of a format"):
        read_image("x", encoded(PICTURE, kind))


def header_alone(width, height):
    """A PNG that ends behind its header."""
    fields = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + fields
    return start + struct.pack(">I", zlib.crc32(fields)) + struct.pack(">I", 9999) + b"IDAT"


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")  # Pillow's own
@pytest.mark.parametrize("source", ["bytes", "path", "data url"])
def test_a_small_file_that_announces_a_large_picture_takes_no_memory(source, tmp_path):
    data = header_alone(13_000, 13_000)
    (tmp_path / "a.png").write_bytes(data)
    given = {
        "bytes": data,
        "path": tmp_path / "a.png",
        "data url": "data:image/png;base64," + base64.b64encode(data).decode(),
    }
    before = peak_memory(reset=True)
    with pytest.raises(InvalidRequestError, match="13000 x 13000 pixels in 41 bytes"):
        read_image("x", given[source])
    assert peak_memory() - before < 20 << 20


def test_a_solid_picture_of_usual_size_may_be_small():
    for kind in ("PNG", "WEBP"):
        data = encoded(Image.new("RGB", (4000, 4000), "white"), kind, lossless=True)
        assert read_image("x", data).size == (4000, 4000)
    # And one bit a pixel is as dense as a PNG can be, at any size.
    data = encoded(Image.new("1", (8000, 8000)))
    assert read_image("x", data).size == (8000, 8000)


def test_a_picture_is_held_once():
    data = encoded(Image.new("RGB", (4000, 4000), "white"), compress_level=1)
    before = peak_memory(reset=True)
    read_image("x", data)
    assert peak_memory() - before < 1.3 * 4 * 4000 * 4000  # Pillow has four bytes a pixel


def test_what_a_caller_has_opened_is_left_as_it_is():
    exif = Image.Exif()
    exif[0x0112] = 6
    opened = Image.open(io.BytesIO(encoded(PICTURE, exif=exif)))
    assert read_image("x", opened).size == PICTURE.size[::-1]
    assert opened.size == PICTURE.size
    assert opened.getexif()[0x0112] == 6


def test_threads_that_read_at_once_leave_the_warning_filters_alone(monkeypatch):
    """Saved and restored filters would be those of whoever overlaps."""
    before = list(warnings.filters)
    barrier = threading.Barrier(2)
    opened = Image.open

    def together(*arguments, **keywords):
        barrier.wait(10)
        return opened(*arguments, **keywords)

    def catch(*arguments, **keywords):
        raise AssertionError("this changes the whole process")

    monkeypatch.setattr(Image, "open", together)
    monkeypatch.setattr(warnings, "catch_warnings", catch)
    data = encoded(PICTURE)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: read_image("x", data), range(4)))
    assert warnings.filters == before
