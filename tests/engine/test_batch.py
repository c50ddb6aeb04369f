"""A step's layout against the same in plain numpy."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglite import _C
from sglite.engine.batch import lay_out
from sglite.engine.request import Request
from sglite.engine.scheduler import ScheduledRequest, Step
from sglite.interface.sampling_params import SamplingParams


def request_with(token_ids, pages, **options):
    request = Request(token_ids, SamplingParams(max_new_tokens=4, **options))
    request.hold(np.array(pages, np.int32))
    return request


@given(data=st.data())
def test_matches_numpy(data):
    draw = data.draw
    page_size = draw(st.integers(1, 9))
    items = []
    for _ in range(draw(st.integers(1, 6))):
        length = draw(st.integers(1, 40))
        pages = draw(st.lists(st.integers(1, 99), min_size=-(-length // page_size), max_size=50))
        tokens = draw(st.lists(st.integers(0, 1000), min_size=length, max_size=length))
        start = draw(st.integers(0, length - 1))
        stop = draw(st.integers(start + 1, length))
        request = request_with(tokens, pages)
        items.append(ScheduledRequest(request, start, stop, stop == length, 0))
    layout = lay_out(Step(items), page_size)

    positions = np.concatenate([np.arange(item.start, item.stop) for item in items])
    counts = [item.stop - item.start for item in items]
    held = [item.request.held_pages for item in items]
    table = np.zeros((len(items), max(map(len, held))), np.int32)
    for row, pages in enumerate(held):
        table[row, : len(pages)] = pages
    owners = np.repeat(np.arange(len(items)), counts)
    slots = table[owners, positions // page_size].astype(np.int64) * page_size
    expected = {
        "input_ids": np.concatenate(
            [item.request.token_ids[item.start : item.stop] for item in items]
        ),
        "positions": positions,
        "slots": slots + positions % page_size,
        "query_start": np.cumsum([0, *counts]).astype(np.int32),
        "kv_lens": np.array([item.stop for item in items], np.int32),
        "kv_end": (positions + 1).astype(np.int32),
        "page_table": table,
    }
    for name, array in expected.items():
        actual = getattr(layout, name)
        assert actual.dtype == array.dtype, name
        assert np.array_equal(actual, array), name
    ends = np.cumsum(counts) - 1
    samples = [item.samples for item in items]
    assert layout.wanted.tolist() == [
        end for end, wants in zip(ends, samples, strict=True) if wants
    ]


def test_rows_of_a_prompts_log_probabilities_come_before_the_next_tokens():
    request = request_with([1, 2, 3, 4], [5], prompt_logprobs=0)
    items = [
        ScheduledRequest(request_with([7, 8], [6]), 1, 2, True, 0),
        ScheduledRequest(request, 0, 4, True, 0),
    ]
    layout = lay_out(Step(items), 4)
    assert layout.wanted.tolist() == [0, 1, 2, 3, 4]
    assert layout.rows[1] == (1, 3, 1, 4)


@pytest.mark.parametrize(
    ("num_pages", "start", "stop", "message"),
    [
        (1, 0, 5, "positions 0 to 5 of a request that holds 5 token ids and 1 pages of 4"),
        (2, 3, 2, "positions 3 to 2"),
        (2, -1, 2, "positions -1 to 2"),
        (2, 0, 9, "token_ids: expected an array of 9 elements or more"),
        (3, 0, 5, "pages: expected an array of 3 elements or more"),
    ],
)
def test_what_a_request_does_not_hold_is_refused(num_pages, start, stop, message):
    tokens, pages = np.arange(8, dtype=np.int64), np.array([3, 4], np.int32)
    with pytest.raises(ValueError, match=message):
        _C.lay_out([tokens], [pages], [num_pages], [start], [stop], 4)


def test_arrays_of_another_dtype_are_refused():
    with pytest.raises(TypeError, match="token_ids: expected contiguous numpy arrays of int64"):
        _C.lay_out([np.arange(3, dtype=np.int32)], [np.zeros(1, np.int32)], [1], [0], [1], 4)
