"""From one decode step to the next, against plain torch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglite import ops
from sglite.ops import reference


def draw_state(rows, page_size, generator, device="cpu"):
    """Arguments of `advance` for some rows, a third of them padding."""

    def integers(low, high, *shape, dtype=torch.int64):
        return torch.randint(low, high, shape, generator=generator).to(dtype).to(device)

    padding = integers(0, 3, rows) == 0
    max_pages = 4
    positions = integers(0, max_pages * page_size - 1, rows)
    kv_lens = (positions + 1).int().masked_fill(padding, 0)
    return [
        integers(-1, 100, rows),
        integers(0, 100, rows),
        positions,
        kv_lens,
        kv_lens.clone(),
        integers(0, 100, rows),
        integers(-5, 1000, rows, 4),
        integers(0, 50, rows, max_pages + 1, dtype=torch.int32)[:, :max_pages],
        page_size,
    ]


def clone(state):
    return [x.clone() if isinstance(x, torch.Tensor) else x for x in state]


def check_advance(rows, page_size, seed, device="cpu"):
    state = draw_state(rows, page_size, torch.Generator().manual_seed(seed), device)
    expected = clone(state)
    reference.advance(*expected)
    ops.advance(*state)
    for actual, wanted in zip(state[:-1], expected[:-1], strict=True):
        assert torch.equal(actual, wanted)


def check_gather(count, previous, wide, seed, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(100, (count,), generator=generator).to(device)
    tokens = torch.randint(-1, 100, (previous,), generator=generator).to(device)
    sources = torch.randint(-1, previous, (count,), generator=generator).to(device)
    sources = sources if wide else sources.int()
    expected = input_ids.clone()
    reference.gather_tokens(expected, tokens, sources)
    ops.gather_tokens(input_ids, tokens, sources)
    assert torch.equal(input_ids, expected)


STATES = {
    "rows": st.integers(0, 300),
    "page_size": st.integers(2, 20),
    "seed": st.integers(0, 2**31),
}
GATHERS = {
    "count": st.integers(0, 300),
    "previous": st.integers(1, 40),
    "wide": st.booleans(),
    "seed": st.integers(0, 2**31),
}


@settings(max_examples=25, deadline=None)
@given(**STATES)
def test_advance_matches_reference(rows, page_size, seed):
    check_advance(rows, page_size, seed)


@settings(max_examples=25, deadline=None)
@given(**GATHERS)
def test_gather_tokens_matches_reference(count, previous, wide, seed):
    check_gather(count, previous, wide, seed)


def test_names_what_is_wrong():
    state = draw_state(3, 4, torch.Generator().manual_seed(0))
    state[3][1], state[2][1] = 16, 15
    before = clone(state)
    with pytest.raises(IndexError, match="advance: position 16 of row 1 is beyond its 4 pages"):
        ops.advance(*state)
    assert torch.equal(state[2], before[2])
    state[3] = state[3].long()
    with pytest.raises(ValueError, match=r"advance: kv_lens: expected int32"):
        ops.advance(*state)
    ids = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(IndexError, match=r"gather_tokens: sources\[2\] is 3 of 3 tokens"):
        ops.gather_tokens(ids, ids.clone(), torch.tensor([0, -1, 3]))
    with pytest.raises(ValueError, match="gather_tokens: sources: expected shape"):
        ops.gather_tokens(ids, ids.clone(), torch.tensor([0]))
