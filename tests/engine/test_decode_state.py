"""Rows that are kept from step to step hold what rows laid out anew would."""

import numpy as np
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st

from sglite import ops
from sglite.cache.kv_pool import KVPool, LayerSpec
from sglite.cache.prefix_cache import PrefixCache
from sglite.engine.batch import lay_out
from sglite.engine.decode_state import DecodeState
from sglite.engine.engine import Engine
from sglite.engine.request import Request
from sglite.engine.sampling_state import SamplingState, parameters
from sglite.engine.scheduler import ScheduledRequest, Scheduler
from sglite.interface.sampling_params import SamplingParams
from tests.engine.fake_runner import VOCAB_SIZE, FakeRunner

MAX_ROWS, MAX_PAGES = 6, 64


class KeepingRunner(FakeRunner):
    """Keeps a state beside the fake model, and compares it in every step that it is for."""

    def __init__(self, num_pages, page_size):
        super().__init__(num_pages, page_size)
        pool = KVPool(num_pages, page_size, [LayerSpec(1, 8)], torch.float32)
        self._layers = pool.layers
        self._state = DecodeState(MAX_ROWS, MAX_PAGES, pool)
        self.num_compared = self.num_uploads = 0
        upload = self._state._upload
        self._state._upload = lambda *args: (self._count_upload(), upload(*args))

    def _count_upload(self):
        self.num_uploads += 1

    def launch(self, step):
        launched = super().launch(step)
        if step.items and step.only_decodes:
            self._compare(step, [outcome.token_id for outcome in launched.outcomes()])
        return launched

    def _compare(self, step, token_ids):
        expected = lay_out(step, self.page_size)
        count = len(step.items)
        states = [SamplingState(item.request, VOCAB_SIZE) for item in step.items]
        self._state.set(step.items, states, None, [-1] * count)
        rows = self._state.rows(count, self._layers, ops.SpareMemory())
        self._state.advance(rows)
        input_ids, positions, batch = rows.inputs
        found = (input_ids, positions, batch.slots, batch.query_start, batch.kv_lens, batch.kv_end)
        fresh = (expected.input_ids, expected.positions, expected.slots, expected.query_start)
        for kept, new in zip(found, (*fresh, expected.kv_lens, expected.kv_end), strict=True):
            assert kept.tolist() == new.tolist()
        for row, item in enumerate(step.items):
            pages = item.request.held_pages
            assert np.array_equal(batch.page_table[row, : len(pages)], pages)
        reals, integers = parameters(states, [item.output_index for item in step.items])
        assert np.array_equal(rows.reals, reals)
        assert np.array_equal(rows.integers, integers)
        rows.token_ids.copy_(torch.tensor(token_ids))  # as sampling does
        self.num_compared += 1


@settings(max_examples=60, deadline=None)
@given(
    jobs=st.lists(st.tuples(st.integers(1, 30), st.integers(2, 25)), min_size=1, max_size=9),
    arrivals=st.lists(st.integers(0, 3), min_size=1, max_size=5),
    aborts=st.dictionaries(st.integers(3, 30), st.integers(0, 8), max_size=3),
    page_size=st.sampled_from([1, 4, 16]),
    spare_pages=st.integers(0, 20),
    prefix_cache=st.booleans(),
)
def test_requests_that_come_and_go(jobs, arrivals, aborts, page_size, spare_pages, prefix_cache):
    largest = max(length + new_tokens for length, new_tokens in jobs)
    num_pages = -(-largest // page_size) + spare_pages + 1
    scheduler = Scheduler(
        PrefixCache(num_pages, page_size, enabled=prefix_cache),
        max_running_requests=MAX_ROWS,
        chunked_prefill_size=16,
    )
    engine = Engine(scheduler, KeepingRunner(num_pages, page_size))
    requests = [
        Request(
            # Some share a prefix, so that one which comes back may find all but its last token.
            range(number % 2, number % 2 + length),
            SamplingParams(temperature=0.5, max_new_tokens=new_tokens).resolve(),
            seed=number,
        )
        for number, (length, new_tokens) in enumerate(jobs)
    ]
    pending, steps = list(requests), 0
    while pending or engine.has_work:
        come = arrivals[steps % len(arrivals)] if engine.has_work else 1
        for request in pending[:come]:
            engine.add(request)
        pending = pending[come:]
        if steps in aborts and aborts[steps] < len(requests) - len(pending):
            engine.abort(requests[aborts[steps]])
        engine.step()
        steps += 1
    runner = engine.runner
    assert all(request.error is None for request in requests)
    event(f"preempted: {scheduler.statistics.preemptions > 0}")
    event(f"kept: {runner.num_uploads < runner.num_compared}")


def test_rows_of_the_same_requests_are_laid_out_once():
    scheduler = Scheduler(
        PrefixCache(80, 4), max_running_requests=MAX_ROWS, chunked_prefill_size=64
    )
    engine = Engine(scheduler, KeepingRunner(80, 4))
    params = SamplingParams(temperature=0, max_new_tokens=30).resolve()
    for number in range(4):
        engine.add(Request([number] * (number + 1), params))
    while engine.has_work:
        engine.step()
    assert (engine.runner.num_compared, engine.runner.num_uploads) == (29, 1)


def test_a_request_that_comes_back_is_laid_out_anew():
    pool = KVPool(8, 4, [LayerSpec(1, 8)], torch.float32)
    state = DecodeState(1, MAX_PAGES, pool)
    request = Request([5] * 7, SamplingParams(max_new_tokens=9).resolve())
    sampling = [SamplingState(request, VOCAB_SIZE)]
    rows = state.rows(1, pool.layers, ops.SpareMemory())
    for incarnation, pages in enumerate([[1, 2], [3, 4]]):  # as many pages, and the next position
        request.num_pages = 0
        request.hold(np.array(pages, np.int32))
        start = 5 + incarnation
        items = [ScheduledRequest(request, start, start + 1, True, incarnation)]
        state.set(items, sampling, None, [-1])
        state.advance(rows)
        assert rows.inputs[2].slots.tolist() == [pages[1] * 4 + start % 4]
