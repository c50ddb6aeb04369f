"""Positions of M-RoPE: time, height and width of each token. (Qwen2-VL; Wang et al., 2024.)"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Grid(NamedTuple):
    """A span of tokens that stands for a picture or video.

    Attributes:
        start: the span's first token.
        time, height, width: tokens along each axis; the span has as many as their product.
        interval: positions of the first row from one point of time to the next.
    """

    start: int
    time: int
    height: int
    width: int
    interval: float = 1.0


def mrope_positions(num_tokens: int, grids: Sequence[Grid]) -> tuple[NDArray[np.int64], int]:
    """The three rows of a prompt, and the offset of what follows it.

    Text counts on in all three rows. A picture's tokens have their place in its grid, counted from
    the position that a text token in the place of its first one had; the text behind it goes on
    after the longer side of the picture.

    Args:
        num_tokens: of the prompt.
        grids: in the order of their spans.

    Returns:
        [3, num_tokens] int64, and what to add to the index of a token behind the prompt.
    """
    positions = np.empty((3, num_tokens), np.int64)
    token, position = 0, 0
    for grid in grids:
        _fill_text(positions, token, grid.start, position)
        position += grid.start - token
        stop = grid.start + grid.time * grid.height * grid.width
        time, height, width = np.indices((grid.time, grid.height, grid.width)).reshape(3, -1)
        # In float32, as a product may fall short of a whole number in one precision alone.
        time = (time.astype(np.float32) * np.float32(grid.interval)).astype(np.int64)
        positions[:, grid.start : stop] = np.stack([time, height, width]) + position
        token = stop
        position += max(grid.height, grid.width)
    _fill_text(positions, token, num_tokens, position)
    return positions, int(positions.max()) + 1 - num_tokens


def _fill_text(positions: NDArray[np.int64], start: int, stop: int, position: int) -> None:
    positions[:, start:stop] = np.arange(position, position + stop - start)
