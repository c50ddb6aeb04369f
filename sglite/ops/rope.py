"""Rotary position embedding, alone and together with what is around it."""

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


def rope_and_write_kv(
    qkv: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    *,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    epsilon: float = 1e-6,
    weight_offset: float = 0.0,
    interleaved: bool = False,
) -> Tensor:
    """Everything between the projection to queries, keys and values and attention.

    `rms_norm` of each head of q and k where there are weights for it, `apply_rope`, `write_kv`: the
    same bits as these three, in one kernel on a GPU.

    Args:
        qkv: [tokens, (heads + 2 * kv_heads) * head_dim], float32, bfloat16 or float16: queries,
            keys, values; rows may be apart. Queries are changed in place; what the columns of the
            keys hold afterwards is unspecified.
        positions: [tokens] int64, rows of `cos_sin`.
        cos_sin: [max_positions, rotary_dim] float32, as for `apply_rope`.
        k_cache: [num_pages, page_size, kv_heads, head_dim], the dtype of `qkv`, contiguous.
        v_cache: shaped like `k_cache`.
        slots: [tokens] int64, as for `write_kv`.
        q_norm: [head_dim], the weight of the queries' norm, the dtype of `qkv`; None: no norm.
        k_norm: [head_dim], that of the keys'.
        epsilon: of both norms.
        weight_offset: of both norms.
        interleaved: which channels form a pair, as for `apply_rope`.

    Returns:
        The queries, [tokens, heads, head_dim], a view of `qkv`.

    Raises:
        IndexError: a position or slot that does not exist (on the CPU); nothing has been changed.
    """
    _C.rope_and_write_kv(
        qkv,
        positions,
        cos_sin,
        k_cache,
        v_cache,
        slots,
        q_norm,
        k_norm,
        epsilon,
        weight_offset,
        interleaved,
    )
    kv_heads, head_dim = k_cache.shape[2:]
    width = qkv.shape[1] - 2 * kv_heads * head_dim
    return qkv[:, :width].unflatten(1, (-1, head_dim))
