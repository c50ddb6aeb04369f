"""Rotary position embedding."""

from torch import Tensor

from sglite import _C


def apply_rope(
    q: Tensor, k: Tensor, positions: Tensor, cos_sin: Tensor, *, interleaved: bool = False
) -> None:
    """Rotates pairs of channels by the angle of their position, in place.

    `(a, b) -> (a * cos - b * sin, b * cos + a * sin)`, where the pairs are channels
    `(i, i + rotary_dim / 2)`, or `(2 * i, 2 * i + 1)` when `interleaved` (GLM, Cohere), and the
    cosine and sine are columns `i` and `i + rotary_dim / 2` of the table's row. Channels from
    `rotary_dim` on stay as they are. Arithmetic is float32; the result is rounded once to the
    tensors' own dtype. (Su et al., 2021.)

    Args:
        q: [tokens, heads, head_dim], float32, bfloat16 or float16; channels side by side, any
            strides between tokens and heads, so that it may be a slice of a fused projection.
        k: [tokens, kv_heads, head_dim], the dtype of `q`, strides likewise.
        positions: [tokens] int64, rows of `cos_sin`.
        cos_sin: [max_positions, rotary_dim] float32, contiguous: cosines in the first half of the
            columns, sines in the second.
        interleaved: which channels form a pair.

    Raises:
        IndexError: a position is negative or not below `max_positions`; nothing has been rotated.
    """
    _C.apply_rope(q, k, positions, cos_sin, interleaved)
