"""Sizes that a checkpoint's image processor asks for: a picture of any size is scaled to them."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sglite.interface.errors import CheckpointError
from sglite.multimodal.images import MAX_PIXELS

_LONGEST_SIDE = math.isqrt(MAX_PIXELS)
# Pixels along a side of what a processor rounds sizes up to, times frames; real ones have 64.
_LARGEST_PATCH = 4096
_EDGES = ("height", "width", "shortest_edge", "longest_edge", "max_height", "max_width")


def check_sizes(image_processor: Any, folder: Path) -> None:
    """Refuses sizes larger than any picture that is read, which no model looks at.

    Args:
        image_processor: Hugging Face's.
        folder: the checkpoint's.

    Raises:
        CheckpointError: naming the size.
    """
    for name, size in _sides_of(image_processor):
        if isinstance(size, int | float) and not size <= _LONGEST_SIDE:
            _refuse(folder, name, size, f"a picture has {_LONGEST_SIDE} pixels along a side")
    patch = 1
    for name in ("patch_size", "merge_size", "temporal_patch_size"):
        size = getattr(image_processor, name, None)
        patch *= size if isinstance(size, int) else 1
    if patch > _LARGEST_PATCH:
        _refuse(folder, "patch_size * merge_size * temporal_patch_size", patch, _LARGEST_PATCH)
    for name, size in _areas_of(image_processor):
        if isinstance(size, int | float) and not size <= MAX_PIXELS:
            _refuse(folder, name, size, f"a picture has {MAX_PIXELS} pixels")


def _sides_of(image_processor: Any) -> list[tuple[str, Any]]:
    sides = []
    for name in ("size", "crop_size", "pad_size"):
        for edge in _EDGES:
            if name != "size" or edge in ("height", "width") or not _has_areas(image_processor):
                sides.append((f"{name}.{edge}", _edge(image_processor, name, edge)))
    for pair in getattr(image_processor, "image_grid_pinpoints", None) or ():
        if isinstance(pair, list | tuple):
            sides += [("image_grid_pinpoints", side) for side in pair]
    return sides


def _areas_of(image_processor: Any) -> list[tuple[str, Any]]:
    """What a small picture is scaled up to: the upper limit alone makes none larger."""
    areas = [("min_pixels", getattr(image_processor, "min_pixels", None))]
    if _has_areas(image_processor):
        areas.append(("size.shortest_edge", _edge(image_processor, "size", "shortest_edge")))
    return areas


def _has_areas(image_processor: Any) -> bool:
    """Whether the "edges" of its size are numbers of pixels, as in Qwen2-VL's and its like."""
    return hasattr(image_processor, "merge_size")


def _edge(image_processor: Any, name: str, edge: str) -> Any:
    size = getattr(image_processor, name, None)
    return size.get(edge) if isinstance(size, Mapping) else getattr(size, edge, None)


def _refuse(folder: Path, name: str, size: Any, most: Any) -> None:
    raise CheckpointError(
        f"the image processor in {folder} (preprocessor_config.json or processor_config.json) has "
        f"{name}={size}; at most {most}"
    )
