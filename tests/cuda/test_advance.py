"""From one decode step to the next on the GPU, against plain torch."""

from hypothesis import given, settings

from tests.ops.test_advance import GATHERS, STATES, check_advance, check_gather


@settings(max_examples=25, deadline=None)
@given(**STATES)
def test_advance(gpu, rows, page_size, seed):
    check_advance(rows, page_size, seed, gpu)


@settings(max_examples=25, deadline=None)
@given(**GATHERS)
def test_gather_tokens(gpu, count, previous, wide, seed):
    check_gather(count, previous, wide, seed, gpu)
