"""From one decode step to the next: the tokens drawn become the tokens fed."""

from torch import Tensor

from sglite import _C


def gather_tokens(input_ids: Tensor, previous_token_ids: Tensor, sources: Tensor) -> None:
    """`input_ids[i] = max(previous_token_ids[sources[i]], 0)` where `sources[i] >= 0`.

    A row without a token (-1, see `sglite.ops.sample`) gives token 0: what is computed of it is
    never looked at, but it has to be one that has an embedding.

    Args:
        input_ids: [N] int64; elements whose source is negative stay as they are.
        previous_token_ids: [M] int64, other memory than `input_ids`.
        sources: [N] int32 or int64, below M.

    Raises:
        ValueError: a shape or dtype is not as described.
        IndexError: on the CPU, a source is M or more; nothing has been written.
    """
    _C.gather_tokens(input_ids, previous_token_ids, sources)


def advance(
    token_ids: Tensor,
    input_ids: Tensor,
    positions: Tensor,
    kv_lens: Tensor,
    kv_end: Tensor,
    slots: Tensor,
    integers: Tensor,
    page_table: Tensor,
    page_size: int,
) -> None:
    """Moves the rows of a decode batch on by one token each, in place.

    For every row with `kv_lens[r] > 0`:

        input_ids[r] = max(token_ids[r], 0)    (as in `gather_tokens`)
        positions[r], kv_lens[r], kv_end[r] and the `position` of integers[r] += 1
        slots[r] = page_table[r, positions[r] // page_size] * page_size + positions[r] % page_size

    Other rows are padding and stay as they are.

    Args:
        token_ids: [R] int64, what the step before has drawn; not changed.
        input_ids: [R] int64, the tokens to feed.
        positions: [R] int64, of the tokens last fed.
        kv_lens: [R] int32, positions in the cache.
        kv_end: [R] int32, the end of what each row sees.
        slots: [R] int64, where the token's key and value go.
        integers: [R, 4] int64, see `sglite.ops.sampling.INTEGERS`.
        page_table: [R, max_pages] int32, the pages of each row in order, the one of the new
            position among them. (On a GPU, a position beyond the table goes to its last page.)
        page_size: positions of a page.

    Raises:
        ValueError: a shape or dtype is not as described.
        IndexError: on the CPU, a position is beyond the page table; nothing has been written.
    """
    _C.advance(
        token_ids,
        input_ids,
        positions,
        kv_lens,
        kv_end,
        slots,
        integers,
        page_table,
        page_size,
    )
