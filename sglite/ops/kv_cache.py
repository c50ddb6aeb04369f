"""Writing keys and values into the paged cache."""

from torch import Tensor

from sglite import _C


def write_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """`cache[slots[t] // page_size, slots[t] % page_size] = row t`, for keys and for values.

    Args:
        k: [tokens, kv_heads, head_dim], float32, bfloat16 or float16; channels side by side, any
            strides between tokens and heads.
        v: shaped like `k`, the same dtype, strides of its own.
        k_cache: [num_pages, page_size, kv_heads, head_dim], the dtype of `k`, contiguous.
        v_cache: shaped like `k_cache`.
        slots: [tokens] int64, `page * page_size + offset`. Where tokens share a slot, what it
            holds is unspecified.

    Raises:
        IndexError: a slot is negative or beyond the cache; nothing has been written.
    """
    _C.write_kv(k, v, k_cache, v_cache, slots)
