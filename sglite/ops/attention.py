"""Attention over a paged key/value cache."""

import torch
from torch import Tensor

from sglite import _C


def _empty_bytes(count: int) -> Tensor:
    return torch.empty(count, dtype=torch.uint8)


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    query_start: Tensor,
    kv_lens: Tensor,
    kv_end: Tensor,
    scale: float,
    *,
    window: int | None = None,
    soft_cap: float | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """`out = softmax(q @ k^T * scale) @ v` over the positions that each row sees.

    A ragged batch: T tokens of B requests, prefill, chunks and decodes in one call. The tokens
    `query_start[b]:query_start[b + 1]` belong to request b and are the last ones of its
    `kv_lens[b]` positions, whose keys and values the cache already holds. Token t at position
    `i` sees the positions `p < kv_end[t]` and, with a window, of those only `p > i - window`.
    A row that sees nothing gives zeros. Positions that a row does not see are never read for it:
    what unwritten slots hold, NaN included, does not matter.

    With `soft_cap` the scores become `soft_cap * tanh(score / soft_cap)` before the softmax
    (Gemma 2). Query heads share KV heads in groups of `q_heads / kv_heads` neighbours.

    Arithmetic is float32, rounded once at the end. A row's bits depend on its query, on the keys
    and values it sees and on their positions, never on the rest of the batch, on how a prompt is
    cut into chunks, on the page table, or on the number of threads: keys are split at absolute
    positions and the parts merged in order. (Online softmax: Milakov and Gimelshein, 2018; paging:
    Kwon et al., 2023; split keys: FlashDecoding, Dao et al., 2023.)

    Args:
        q: [T, q_heads, head_dim], float32, bfloat16 or float16; channels side by side, any strides
            between tokens and heads.
        k_cache: [pages, page_size, kv_heads, head_dim], the dtype of `q`, contiguous.
        v_cache: shaped like `k_cache`.
        page_table: [B, max_pages] int32; entry i of row b is the page that holds the positions
            `i * page_size` to `(i + 1) * page_size - 1` of request b.
        query_start: [B + 1] int32, from 0 to T.
        kv_lens: [B] int32.
        kv_end: [T] int32, at most the request's `kv_lens`.
        scale: usually `head_dim ** -0.5`.
        window: how many positions up to its own a row sees; None for all.
        soft_cap: None for none.
        out: [T, q_heads, head_dim], where to write; allocated when absent.

    Returns:
        `out`.

    Raises:
        ValueError: a shape, dtype, length or page does not fit; the message names it.
    """
    if out is None:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
    _C.paged_attention(
        out,
        q,
        k_cache,
        v_cache,
        page_table,
        query_start,
        kv_lens,
        kv_end,
        scale,
        window,
        soft_cap,
        _empty_bytes,
    )
    return out
