"""Writing keys and values into the paged cache."""

from collections.abc import Sequence

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


def copy_kv_slots(caches: Sequence[Tensor], sources: Tensor, destinations: Tensor) -> None:
    """`slot[destinations[i]] = slot[sources[i]]` in every cache, for copy on write.

    All sources are read before the first destination is written, so the two may overlap. On a GPU,
    128 caches are one kernel.

    Args:
        caches: each [num_pages, page_size, kv_heads, head_dim], contiguous, float32, bfloat16 or
            float16; kv_heads, head_dim and the dtype may differ.
        sources: [count] int64, `page * page_size + offset`.
        destinations: [count] int64, all different.

    Raises:
        IndexError: a slot that does not exist (on the CPU); nothing has been copied.
        ValueError: more than 24,576 slots on a GPU.
    """
    _C.copy_kv_slots(caches, sources, destinations)
