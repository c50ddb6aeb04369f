"""Pictures in tiles: what of the tiles' patches is picture, and how many stay. (LLaVA-NeXT.)"""

import math


def crop_of(rows: int, columns: int, height: int, width: int) -> tuple[slice, slice]:
    """The rows and columns of patches that a picture fills, which lies in the middle of tiles.

    Args:
        rows, columns: patches of all tiles.
        height, width: of the picture; it was scaled to touch two opposite sides.
    """
    if width / height > columns / rows:
        filled = int(round(height * (columns / width), 7))
        margin = (rows - filled) // 2
        return slice(margin, rows - margin), slice(0, columns)
    filled = int(round(width * (rows / height), 7))
    margin = (columns - filled) // 2
    return slice(0, rows), slice(margin, columns - margin)


def shrunk(rows: int, columns: int, side: int, aspect_ratio: str) -> tuple[int, int]:
    """Rows and columns of patches that are left where a limit is set. (LLaVA-OneVision.)

    Args:
        rows, columns: patches of the picture.
        side: patches along a side of a tile.
        aspect_ratio: "anyres_max_9", say: as many as nine tiles have.
    """
    most = int(aspect_ratio.rpartition("_")[2])
    ratio = math.sqrt(rows * columns / (most * side**2))
    if ratio <= 1.1:
        return rows, columns
    return int(rows // ratio), int(columns // ratio)
