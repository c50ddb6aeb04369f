"""Videos as lists of frames, with the rate at which these follow each other where it is known."""

from collections.abc import Mapping
from typing import Any

from PIL import Image

from sglite.interface import checks
from sglite.interface.errors import InvalidRequestError, suggest
from sglite.multimodal.images import Fetcher, read_frames

_KEYS = ("frames", "fps")


class Video(list[Image.Image]):
    """The frames of a video, RGB and of one size.

    Attributes:
        fps: frames per second; None: the caller did not say.
    """

    def __init__(self, frames: list[Image.Image], fps: float | None = None):
        super().__init__(frames)
        self.fps = fps


def read_video(name: str, video: Any, fetch: Fetcher | None = None) -> Video:
    """A video in one of the forms in which a caller may have it.

    Args:
        name: how messages call it.
        video: a list of frames as `read_frames` takes it, or a dict with `frames`, that list, and
            maybe `fps`, how many of them there are in a second.
        fetch: as for `read_image`.

    Raises:
        InvalidRequestError: as `read_frames`; the dict lacks frames or has something else, or the
            rate is no number above 0.
    """
    if not isinstance(video, Mapping):
        return Video(read_frames(name, video, fetch))
    for key in video:
        if key not in _KEYS:
            hint = suggest(key, _KEYS) if isinstance(key, str) else ""
            raise InvalidRequestError(
                f"{name} has the unknown key {key!r}.{hint} Known: {', '.join(_KEYS)}."
            )
    if video.get("frames") is None:
        raise InvalidRequestError(f"{name} is a dict without 'frames', a list of images")
    fps = video.get("fps")
    if fps is not None:
        fps = checks.real(f"{name}['fps']", fps, minimum=0.0, above=True)
    return Video(read_frames(name, video["frames"], fetch), fps)
