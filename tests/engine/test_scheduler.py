"""The scheduler, with a fake model: every request ends with the tokens it gets alone."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglite.cache.prefix_cache import PrefixCache
from sglite.engine.engine import Engine
from sglite.engine.request import Request
from sglite.engine.scheduler import Scheduler, common_prefix_length
from sglite.engine.stopping import StopChecker
from sglite.interface.errors import RequestError
from sglite.interface.sampling_params import SamplingParams
from tests.engine.fake_runner import FakeRunner, expected_output


def make_engine(num_pages=40, page_size=4, enabled=True, max_running=8, chunk=16, runs_ahead=False):
    cache = PrefixCache(num_pages + 1, page_size, enabled=enabled)
    scheduler = Scheduler(cache, max_running_requests=max_running, chunked_prefill_size=chunk)
    return Engine(scheduler, FakeRunner(num_pages + 1, page_size, runs_ahead))


def make_request(prompt, max_new_tokens=8, end_token=None, **parameters):
    params = SamplingParams(max_new_tokens=max_new_tokens, **parameters).resolve()
    ends = () if end_token is None else (end_token,)
    return Request(prompt, params, stop_checker=StopChecker(params, end_token_ids=ends))


def run(engine, requests=(), max_steps=5000, check=True):
    for request in requests:
        engine.add(request)
    steps = 0
    while engine.has_work:
        engine.step()
        if check:
            check_pages(engine)
        steps += 1
        assert steps < max_steps, "no end in sight"
    return steps


def check_pages(engine):
    scheduler = engine.scheduler
    scheduler.cache.check_invariant([request.held_pages for request in scheduler.running])
    for request in scheduler.waiting:
        assert request.num_pages == 0


prompts = st.lists(st.integers(0, 3), min_size=1, max_size=30)


@settings(max_examples=150, deadline=None)
@given(
    jobs=st.lists(
        st.tuples(prompts, st.integers(1, 12), st.sampled_from([None, 7])), min_size=1, max_size=12
    ),
    page_size=st.sampled_from([1, 2, 4, 16]),
    spare_pages=st.integers(0, 12),
    enabled=st.booleans(),
    max_running=st.integers(1, 6),
    chunk=st.integers(1, 40),
    arrivals=st.integers(1, 6),
    runs_ahead=st.booleans(),
    one_needs_commit=st.booleans(),
)
def test_every_request_gets_what_it_gets_alone(
    jobs,
    page_size,
    spare_pages,
    enabled,
    max_running,
    chunk,
    arrivals,
    runs_ahead,
    one_needs_commit,
):
    # The pool just holds the largest request, and a little more: preemption all the time.
    largest = max(len(prompt) + count - 1 for prompt, count, _ in jobs)
    engine = make_engine(
        -(-largest // page_size) + spare_pages, page_size, enabled, max_running, chunk, runs_ahead
    )
    requests = [make_request(*job) for job in jobs]
    if one_needs_commit:
        requests[-1] = make_request(*jobs[-1], presence_penalty=1.0)
    pending = list(requests)
    while pending or engine.has_work:
        for request in pending[:arrivals]:
            engine.add(request)
        pending = pending[arrivals:]
        engine.step()
        check_pages(engine)
        assert engine.scheduler.statistics.steps < 20_000
    for request, (prompt, count, end_token) in zip(requests, jobs, strict=True):
        assert request.error is None
        assert request.output_token_ids == expected_output(prompt, count, end_token)
        ended = end_token is not None and request.output_token_ids[-1] == end_token
        assert request.finish_reason == ("stop" if ended else "length")


@settings(max_examples=60, deadline=None)
@given(
    jobs=st.lists(st.tuples(prompts, st.integers(1, 12)), min_size=1, max_size=8),
    fail_at=st.integers(1, 10),
    abort_at=st.integers(1, 10),
    victim=st.integers(0, 7),
    runs_ahead=st.booleans(),
)
def test_failures_and_aborts_leave_the_books_in_order(jobs, fail_at, abort_at, victim, runs_ahead):
    engine = make_engine(num_pages=14, chunk=7, runs_ahead=runs_ahead)
    engine.runner.fail_at_step = fail_at
    requests = [make_request(*job) for job in jobs]
    for request in requests:
        engine.add(request)
    steps = 0
    while engine.has_work:
        steps += 1
        if steps == abort_at:
            engine.abort(requests[victim % len(requests)])
            check_pages(engine)
        engine.step()
        check_pages(engine)
    for request, job in zip(requests, jobs, strict=True):
        expected = expected_output(*job)
        if request.error is not None:
            assert isinstance(request.error, RequestError)
            assert "planted failure" in str(request.error)
            assert isinstance(request.error.__cause__, RuntimeError)
        if request.finish_reason in ("error", "abort"):
            assert request.output_token_ids == expected[: len(request.output_token_ids)]
        else:
            assert request.output_token_ids == expected
    # The engine is as usable as before.
    engine.runner.fail_at_step = None
    again = make_request(*jobs[0])
    run(engine, [again])
    assert again.output_token_ids == expected_output(*jobs[0])


def test_a_shared_prefix_is_computed_once():
    shared = list(np.random.default_rng(0).integers(0, 50, 64))
    requests = [make_request([*shared, 1, index, 2, 3], 4) for index in range(10)]
    engine = make_engine(num_pages=100, chunk=16, max_running=10)
    run(engine, requests)
    # 64 shared, at most page-size tokens beside the own ones for each, and 3 decode steps each.
    assert engine.runner.num_computed_tokens <= 64 + 10 * (4 + 4 + 3)
    assert all(request.num_cached_tokens >= 64 for request in requests[1:])


def test_requests_that_share_nothing_do_not_wait_for_each_other():
    engine = make_engine(num_pages=100, chunk=64)
    requests = [make_request([index] * 8, 1) for index in range(4)]
    assert run(engine, requests) == 1


def test_n_completions_share_the_prompt():
    engine = make_engine(num_pages=100)
    run(engine, [make_request(list(range(20)), 2) for _ in range(3)])
    assert engine.runner.num_computed_tokens <= 20 + 2 * (20 % 4 + 4) + 3


def test_prefill_chunks_keep_to_the_budget_over_all_requests():
    engine = make_engine(num_pages=100, chunk=10)
    for request in [make_request(list(range(index, index + 13)), 3) for index in range(5)]:
        engine.add(request)
    while engine.has_work:
        step = engine.scheduler.schedule()
        prefill = [item.stop - item.start for item in step.items if item.stop - item.start > 1]
        assert sum(prefill) <= 10
        engine.scheduler.commit(step, engine.runner.launch(step).outcomes())


def test_decoding_goes_on_while_a_long_prompt_is_prefilled():
    engine = make_engine(num_pages=100, chunk=8)
    short, long = make_request([1, 2, 3], 20), make_request(list(range(40)) * 2, 1)
    engine.add(short)
    engine.step()
    engine.add(long)
    before = len(short.output_token_ids)
    engine.step()
    engine.step()
    assert len(short.output_token_ids) == before + 2
    assert not long.is_finished


def test_a_step_is_launched_before_the_one_before_it_is_committed():
    engine = make_engine(num_pages=100, runs_ahead=True)
    request = make_request([1, 2, 3], 5)
    engine.add(request)
    known = []
    while engine.has_work:
        engine.step()
        known.append((engine.runner.num_steps, len(request.output_token_ids)))
    # The fifth token is the last, so that no sixth step is launched for nothing.
    assert known == [(1, 0), (2, 1), (3, 2), (4, 3), (5, 4), (5, 5)]


def test_what_comes_after_an_end_token_is_dropped():
    output = expected_output([1, 2, 3], 10)
    end = next(token for token in output if output.index(token) == 3)
    engine = make_engine(num_pages=100, runs_ahead=True)
    request = make_request([1, 2, 3], 10, end)
    run(engine, [request])
    assert request.output_token_ids == output[:4]
    assert engine.runner.num_steps == 5
    assert engine.scheduler.statistics.completion_tokens == 4
    check_pages(engine)


def test_a_request_that_needs_its_last_token_stops_the_running_ahead():
    engine = make_engine(num_pages=100, runs_ahead=True)
    request = make_request([1, 2, 3], 5, repetition_penalty=1.5)
    engine.add(request)
    for count in range(5):
        assert len(request.output_token_ids) == max(0, count - 1)
        engine.step()
        assert request.num_tokens == 3 + count
    run(engine)
    run(engine, [make_request([1, 2, 3], 5)])
    assert engine.scheduler.can_run_ahead


def test_the_second_turn_reuses_the_first():
    engine = make_engine(num_pages=100)
    first = make_request(list(range(10)), 6)
    run(engine, [first])
    turn = [*range(10), *first.output_token_ids, 1, 2]
    second = make_request(turn, 2)
    run(engine, [second])
    assert second.num_cached_tokens == 10 + 6 - 1  # the last token was never computed


def test_oldest_first_under_preemption():
    engine = make_engine(num_pages=6, page_size=4, max_running=4, enabled=False)
    requests = [make_request([index] * 8, 9) for index in range(3)]
    run(engine, requests)
    assert engine.scheduler.statistics.preemptions > 0
    finished = [request.finished_at for request in requests]
    assert finished == sorted(finished)


def test_statistics_add_up():
    engine = make_engine(num_pages=100)
    run(engine, [make_request([1, 2, 3, 4, 5], 3), make_request([9, 8, 7], 2)])
    counts = engine.scheduler.statistics
    assert (counts.prompt_tokens, counts.completion_tokens, counts.cached_tokens) == (8, 5, 0)
    assert counts.tokens_per_second > 0


@pytest.mark.parametrize(
    ("a", "b", "length"),
    [([], [1], 0), ([1, 2], [1, 2], 2), ([1, 2, 3], [1, 2, 4, 5], 2), ([2], [1], 0)],
)
def test_common_prefix_length(a, b, length):
    assert common_prefix_length(np.array(a, np.int64), np.array(b, np.int64)) == length
