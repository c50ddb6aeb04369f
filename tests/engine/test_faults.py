"""Whatever raises, wherever: the requests concerned fail, and the books are right for the next."""

import contextlib
import logging

import pytest

from sglite.engine.driver import Driver
from sglite.engine.request import Request
from sglite.engine.stopping import StopChecker
from sglite.engine.waiting import Call
from sglite.interface.errors import RequestError
from tests.engine.fake_runner import expected_output
from tests.engine.test_driver import driver_threads, finish, make_driver, wait_until
from tests.engine.test_scheduler import check_pages, make_engine, make_request
from tests.faults import Fault, Planted

PROMPTS = [[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 9], [7] * 21, [8, 8]]
# A pool that is too small for all of them: requests are preempted, and come back.
SMALL = {"num_pages": 11, "page_size": 4, "max_running": 3, "chunk": 8}


def run_all(driver):
    calls = [
        Call([make_request(prompt, 10) for prompt in pair]) for pair in (PROMPTS[:2], PROMPTS[2:])
    ]
    for call in calls:
        driver.submit(call)
    for call in calls:
        finish(call)
    wait_until(lambda: not driver_threads())
    return [request for call in calls for request in call.requests]


def check_right(requests):
    for prompt, request in zip(PROMPTS, requests, strict=True):
        assert request.error is None
        assert request.output_token_ids == expected_output(prompt, 10)


@pytest.mark.parametrize("runs_ahead", [False, True])
def test_an_exception_at_any_line_leaves_nobody_waiting_and_the_books_right(runs_ahead):
    counting = Fault(at=0)
    with counting.planted():
        check_right(run_all(make_driver(make_engine(runs_ahead=runs_ahead, **SMALL))))
    assert counting.num_lines > 2000
    places = set()
    for at in range(1, counting.num_lines, counting.num_lines // 120):
        engine = make_engine(runs_ahead=runs_ahead, **SMALL)
        driver = make_driver(engine)
        with Fault(at).planted() as fault:
            requests = run_all(driver)
        check_pages(engine)
        for prompt, request in zip(PROMPTS, requests, strict=True):
            expected = expected_output(prompt, 10)
            assert request.output_token_ids == expected[: len(request.output_token_ids)]
            if request.error is None:
                assert request.output_token_ids == expected
            else:
                assert isinstance(request.error.__cause__, Planted), request.error
        check_right(run_all(driver))
        check_pages(engine)
        places.add(fault.where)
    assert len(places - {None}) > 60


@pytest.mark.parametrize("runs_ahead", [False, True])
@pytest.mark.parametrize("fails_in", ["launch", "outcomes"])
def test_a_step_that_fails_ends_those_in_it_and_nobody_who_waits(runs_ahead, fails_in):
    for step in range(1, 12):
        engine = make_engine(num_pages=40, max_running=2, runs_ahead=runs_ahead)
        launch = engine.runner.launch

        def failing(scheduled, launch=launch, engine=engine, step=step):
            launched = launch(scheduled)
            if engine.runner.num_steps == step:
                if fails_in == "launch":
                    raise MemoryError("planted")
                launched.outcomes = lambda: [][1]
            return launched

        engine.runner.launch = failing
        requests = run_all(make_driver(engine))
        check_pages(engine)
        failed = [request for request in requests if request.error]
        assert 1 <= len(failed) <= 2
        for request in failed:
            assert isinstance(request.error.__cause__, MemoryError | IndexError)
        check_right(run_all(make_driver(engine)))


@pytest.mark.parametrize("name", ["fail_all", "rest"])
@pytest.mark.parametrize("times", [1, 2])
def test_a_fault_while_another_is_dealt_with(name, times):
    """As when memory is short: what catches the first one fails in its turn."""
    engine = make_engine()
    driver = make_driver(engine)
    original = getattr(engine, name)
    raised = []

    def failing(*arguments):
        if len(raised) < times:
            raised.append(1)
            raise Planted("the second")
        return original(*arguments)

    def fail_first(step):
        del engine.runner.launch
        engine.scheduler.fail = None  # so that the engine cannot deal with it
        raise Planted("the first")

    setattr(engine, name, failing)
    engine.runner.launch = fail_first
    calls = [Call([make_request(prompt, 10)]) for prompt in PROMPTS]
    for call in calls:
        driver.submit(call)
    for call in calls:
        finish(call)
    wait_until(lambda: not driver_threads())
    del engine.scheduler.fail
    check_pages(engine)
    check_right(run_all(driver))


def test_a_call_that_cannot_be_told_is_told_again():
    driver = make_driver(make_engine())
    call = Call([make_request([1, 2])])
    wake, raised = call._wake, []

    def failing():
        if not raised:
            raised.append(1)
            raise MemoryError("planted")
        wake()

    call._wake = failing
    driver.submit(call)
    finish(call)
    wait_until(lambda: not driver_threads())


class UnprintableError(Exception):
    """What a model's own code may raise."""

    def __str__(self):
        raise RuntimeError("no text")


@pytest.mark.parametrize("raised", [UnprintableError(), Planted("planted")])
@pytest.mark.parametrize("logger", ["engine", "driver"])
def test_a_log_filter_that_raises_leaves_nobody_waiting(raised, logger):
    class Broken(logging.Filter):
        def filter(self, record):
            records.append(record)
            raise OSError("the host's own filter")

    records = []
    engine = make_engine()
    launch = engine.runner.launch

    def failing(step):
        engine.runner.launch = launch
        raise raised

    engine.runner.launch = failing
    if logger == "driver":  # the engine cannot deal with it
        engine.scheduler.fail = None
    driver, broken = make_driver(engine), Broken()
    log = logging.getLogger(f"sglite.engine.{logger}")
    log.addFilter(broken)
    try:
        call = Call([make_request([1, 2])])
        driver.submit(call)
        finish(call)
    finally:
        log.removeFilter(broken)
    assert records
    assert isinstance(call.requests[0].error, RequestError)
    if logger == "driver":
        del engine.scheduler.fail
    check_right(run_all(driver))


def test_each_request_has_an_error_of_its_own():
    """Whoever raises it gives it a traceback, which is nobody else's affair."""
    engine = make_engine()

    def failing(step):
        raise MemoryError("planted")

    engine.runner.launch = failing
    driver = make_driver(engine)
    call = Call([make_request([1, 2]), make_request([3])])
    driver.submit(call)
    finish(call)
    first, second = (request.error for request in call.requests)
    assert first is not second
    assert first.__cause__ is second.__cause__


class BrokenText:
    """A detokenizer whose Rust half panics."""

    def __init__(self, fails_at):
        self.tokens = 0
        self.fails_at = fails_at

    def add(self, token_id):
        self.tokens += 1
        if self.tokens == self.fails_at:
            raise Planted("panicked")
        return "x"

    def flush(self):
        if self.tokens >= self.fails_at:
            raise Planted("panicked again")
        return ""


@pytest.mark.parametrize("fails_at", [1, 4, 10])
def test_a_tokenizer_that_fails_on_one_text_ends_that_request_alone(fails_at):
    engine = make_engine()
    driver = make_driver(engine)
    requests = [make_request(prompt, 10) for prompt in PROMPTS]
    params = requests[1].params
    checker = StopChecker(params, detokenizer=BrokenText(fails_at))
    requests[1] = Request(PROMPTS[1], params, stop_checker=checker)
    call = Call(requests)
    driver.submit(call)
    finish(call)
    check_pages(engine)
    for index, (prompt, request) in enumerate(zip(PROMPTS, call.requests, strict=True)):
        if index == 1:
            assert isinstance(request.error, RequestError)
            assert isinstance(request.error.__cause__, Planted)
        else:
            assert request.output_token_ids == expected_output(prompt, 10)


def test_a_thread_that_cannot_begin_fails_the_calls_that_wait_for_it():
    broken = True

    @contextlib.contextmanager
    def state():
        if broken:
            raise OSError("no device")
        yield

    driver = Driver(make_engine(), state)
    call = Call([make_request([1, 2])])
    driver.submit(call)
    finish(call)
    assert isinstance(call.requests[0].error.__cause__, OSError)
    broken = False
    check_right(run_all(driver))


def test_a_request_that_the_scheduler_loses_is_no_hang():
    engine = make_engine()
    engine.scheduler.add = lambda request: None
    driver = make_driver(engine)
    call = Call([make_request([1, 2])])
    driver.submit(call)
    finish(call)
    assert "lost" in str(call.requests[0].error)
