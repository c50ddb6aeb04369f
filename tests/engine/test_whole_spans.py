"""Images that see both ways are computed in one step, and come out of the cache whole."""

import numpy as np
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sglite.engine.batch import lay_out
from sglite.engine.request import Request
from sglite.engine.scheduler import ScheduledRequest, Step
from sglite.interface.sampling_params import SamplingParams
from sglite.multimodal.inputs import MultimodalInputs, MultimodalItem
from sglite.multimodal.keys import pad_input_ids
from tests.engine.fake_runner import expected_output
from tests.engine.test_scheduler import check_pages, make_engine, run

PAD = 9


def make_request(parts, max_new_tokens=4):
    """A prompt of texts (lists of ids) and images (numbers of tokens)."""
    ids, items = [], []
    for part in parts:
        if isinstance(part, int):
            pixels = torch.full((1,), float(part))
            items.append(MultimodalItem("image", pixels, len(ids), len(ids) + part))
            ids += [PAD] * part
        else:
            ids += part
    inputs = MultimodalInputs(items, whole_spans=True)
    return Request(
        ids,
        SamplingParams(max_new_tokens=max_new_tokens).resolve(),
        multimodal=inputs,
        prompt_keys=pad_input_ids(ids, inputs),
    )


def spy(engine):
    """Collects (request, start, stop) of all that is computed."""
    seen = []
    launch = engine.runner.launch

    def watched(step):
        seen.extend((item.request, item.start, item.stop) for item in step.items)
        return launch(step)

    engine.runner.launch = watched
    return seen


part = st.one_of(st.integers(1, 9), st.lists(st.integers(0, 3), min_size=1, max_size=6))


@settings(max_examples=100, deadline=None)
@given(
    prompts=st.lists(st.lists(part, min_size=1, max_size=5), min_size=1, max_size=6),
    page_size=st.sampled_from([1, 4, 16]),
    spare_pages=st.integers(0, 6),
    chunk=st.integers(1, 12),
    enabled=st.booleans(),
)
# No page is left for a copy of the partial one, and the whole ones end in an image.
@example(prompts=[[1, 1, 6, 9, 1]], page_size=16, spare_pages=0, chunk=1, enabled=True)
def test_no_step_cuts_an_image(prompts, page_size, spare_pages, chunk, enabled):
    requests = [make_request(parts) for parts in prompts for _ in range(2)]
    largest = max(request.max_tokens for request in requests)
    engine = make_engine(-(-largest // page_size) + spare_pages, page_size, enabled, chunk=chunk)
    seen = spy(engine)
    run(engine, requests)
    check_pages(engine)
    for request in requests:
        assert request.output_token_ids == expected_output(request.prompt_token_ids, 4)
    for request, start, stop in seen:
        for border in (start, stop):
            assert request.multimodal.span_around(border) is None


def test_a_prompt_that_ends_in_an_image_computes_it_again():
    engine = make_engine(40, 4, chunk=100)
    for expected in (0, 3):
        request = make_request([[1, 2, 3], 8])
        run(engine, [request])
        assert request.num_cached_tokens == expected


def test_an_image_above_the_chunk_size_is_computed_at_once():
    engine = make_engine(40, 4, chunk=4)
    request = make_request([[1, 2], 30, [1]])
    seen = spy(engine)
    run(engine, [request])
    assert [(start, stop) for _, start, stop in seen][:3] == [(0, 2), (2, 32), (32, 33)]


def test_its_tokens_see_it_whole_and_others_do_not():
    request = make_request([[1, 2], 3, [1, 2], 2, [1]])
    request.hold(np.arange(1, 4, dtype=np.int32))
    other = Request([1, 2, 3], SamplingParams(max_new_tokens=1))
    other.hold(np.array([9], np.int32))
    items = [
        ScheduledRequest(other, 0, 3, True, 0),
        ScheduledRequest(request, 2, 10, True, 0),
    ]
    layout = lay_out(Step(items), 4)
    assert layout.kv_end.tolist() == [1, 2, 3, 5, 5, 5, 6, 7, 9, 9, 10]
    assert layout.positions.tolist() == [0, 1, 2, *range(2, 10)]
