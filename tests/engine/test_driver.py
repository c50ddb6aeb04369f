"""The driver thread: it comes and goes with the requests, and leaves nobody waiting."""

import contextlib
import gc
import subprocess
import sys
import threading
import time
import weakref

import pytest

from sglite.engine.driver import Driver
from sglite.engine.waiting import Call
from sglite.interface.errors import EngineClosedError, RequestError, SGLiteError
from tests.engine.fake_runner import expected_output
from tests.engine.test_scheduler import check_pages, make_engine, make_request


def make_driver(engine, **options):
    return Driver(engine, contextlib.nullcontext, **options)


def slow_down(engine, seconds=0.005):
    """Makes each step last a while, so that there is time to interfere."""
    run = engine.runner.launch

    def slow_run(step):
        time.sleep(seconds)
        return run(step)

    engine.runner.launch = slow_run


def finish(call):
    seen = 0
    while not call.is_finished:
        seen = call.wait(seen)


def driver_threads():
    return [thread for thread in threading.enumerate() if thread.name == "sglite-driver"]


def wait_until(condition, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.001)


def test_runs_a_call_and_then_has_no_thread():
    engine = make_engine()
    driver = make_driver(engine)
    call = Call([make_request([1, 2, 3]), make_request([4, 5])])
    driver.submit(call)
    finish(call)
    assert call.requests[0].output_token_ids == expected_output([1, 2, 3], 8)
    wait_until(lambda: not driver_threads())
    check_pages(engine)


def test_an_idle_driver_is_freed_at_once():
    engine = make_engine()
    driver = make_driver(engine)
    call = Call([make_request([1, 2, 3])])
    driver.submit(call)
    finish(call)
    wait_until(lambda: not driver_threads())
    observed = weakref.ref(engine)
    gc.disable()
    try:
        del driver, engine
        assert observed() is None, "something holds the engine, a reference cycle perhaps"
    finally:
        gc.enable()


def test_many_threads_share_batches_and_get_their_own_results():
    engine = make_engine(num_pages=200, max_running=16)
    slow_down(engine)
    driver = make_driver(engine)
    prompts = [[index, 2, 3, index] for index in range(12)]
    results = [None] * len(prompts)

    def work(index):
        call = Call([make_request(prompts[index], 10)])
        driver.submit(call)
        finish(call)
        results[index] = call.requests[0].output_token_ids

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [expected_output(prompt, 10) for prompt in prompts]
    # Alone, one after the other, they would have taken 12 x 10 steps.
    assert engine.scheduler.statistics.steps < 60


def test_abort_ends_one_call_only():
    engine = make_engine(num_pages=200)
    slow_down(engine)
    driver = make_driver(engine)
    unwanted, wanted = Call([make_request([1, 2], 150)]), Call([make_request([3, 4], 20)])
    driver.submit(unwanted)
    driver.submit(wanted)
    wait_until(lambda: unwanted.requests[0].output_token_ids)
    driver.abort(unwanted)
    assert unwanted.requests[0].finish_reason == "abort"
    finish(wanted)
    assert wanted.requests[0].output_token_ids == expected_output([3, 4], 20)
    wait_until(lambda: not driver_threads())
    check_pages(engine)


def test_close_ends_everything_and_refuses_more():
    engine = make_engine(num_pages=200)
    slow_down(engine)
    driver = make_driver(engine)
    call = Call([make_request([1, 2], 150)])
    driver.submit(call)
    wait_until(lambda: call.requests[0].output_token_ids)
    driver.close()
    assert call.requests[0].finish_reason == "abort"
    assert not driver_threads()
    with pytest.raises(EngineClosedError):
        driver.submit(Call([make_request([1])]))
    driver.close()


def test_a_call_whose_thread_has_died_is_aborted():
    engine = make_engine(num_pages=200)
    slow_down(engine)
    driver = make_driver(engine)
    calls = []

    def start_and_leave():
        calls.append(Call([make_request([1, 2], 150)]))
        driver.submit(calls[0])

    thread = threading.Thread(target=start_and_leave)
    thread.start()
    thread.join()
    wait_until(lambda: calls[0].is_finished)
    assert calls[0].requests[0].finish_reason == "abort"


def test_what_is_read_by_one_thread_after_the_other_outlives_them():
    """A web server reads streams on threads of a pool, which come and go."""
    engine = make_engine(num_pages=200)
    slow_down(engine)
    driver = make_driver(engine)
    call = Call([make_request([1, 2], 60)], every_token=True)
    driver.submit(call)
    for _ in range(3):
        thread = threading.Thread(target=driver.wait, args=(call,))
        thread.start()
        thread.join()
        steps = engine.scheduler.statistics.steps
        wait_until(lambda steps=steps: engine.scheduler.statistics.steps > steps + 3)
    finish(call)
    assert call.requests[0].output_token_ids == expected_output([1, 2], 60)


@pytest.mark.parametrize("waits", [True, False])
def test_an_interrupt_while_the_thread_starts_makes_no_second_one(monkeypatch, waits):
    """The first thread may come to life before or after the one that follows it."""
    engine = make_engine(num_pages=200)
    slow_down(engine)
    step, inside, at_once = engine.step, [], []

    def watched_step():
        inside.append(1)
        at_once.append(len(inside))
        step()
        inside.pop()

    engine.step = watched_step
    may_begin, begun = threading.Event(), []

    @contextlib.contextmanager
    def state():
        begun.append(1)
        if len(begun) == 1 and waits:
            may_begin.wait()
        yield

    driver = Driver(engine, state)
    start = threading.Thread.start

    def interrupted_start(thread):
        monkeypatch.setattr(threading.Thread, "start", start)
        start(thread)
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", interrupted_start)
    with pytest.raises(KeyboardInterrupt):
        driver.submit(Call([make_request([1])]))
    wait_until(lambda: begun)
    call = Call([make_request([1, 2], 50)])
    driver.submit(call)
    wait_until(lambda: len(call.requests[0].output_token_ids) > 5)
    may_begin.set()
    finish(call)
    assert set(at_once) == {1}
    assert call.requests[0].output_token_ids == expected_output([1, 2], 50)
    wait_until(lambda: not driver_threads())
    check_pages(engine)


def within_a_step(engine, action):
    """Has a step do something on its way, once."""
    run = engine.runner.launch

    def run_and_act(step):
        engine.runner.launch = run
        action()
        return run(step)

    engine.runner.launch = run_and_act


def test_a_step_that_waits_for_its_own_call_is_refused():
    engine = make_engine()
    driver = make_driver(engine)
    call, errors = Call([make_request([1, 2])]), []

    def wait():
        with pytest.raises(SGLiteError, match="from within its own step") as caught:
            driver.wait(call)
        errors.append(caught.value)

    within_a_step(engine, wait)
    driver.submit(call)
    finish(call)
    assert len(errors) == 1
    assert call.requests[0].output_token_ids == expected_output([1, 2], 8)


def test_a_step_may_abort_a_call_and_does_not_wait():
    engine = make_engine()
    driver = make_driver(engine)
    call = Call([make_request([1, 2], 30)])
    within_a_step(engine, lambda: driver.abort(call))
    driver.submit(call)
    finish(call)
    assert call.requests[0].finish_reason == "abort"
    assert call.ended_as == "it was aborted"


def test_close_waits_for_a_thread_that_has_nothing_left_to_do():
    """What it still frees as it ends is then freed as well."""
    events = []

    @contextlib.contextmanager
    def state():
        yield
        time.sleep(0.2)
        events.append("thread")

    driver = Driver(make_engine(), state)
    call = Call([make_request([1, 2, 3])])
    driver.submit(call)
    finish(call)
    driver.close(lambda: events.append("end"))
    assert events == ["thread", "end"]


def test_a_step_may_close_the_driver_which_ends_behind_it():
    engine = make_engine()
    driver = make_driver(engine)
    call, order = Call([make_request([1, 2], 30)]), []
    step = engine.step

    def watched_step():
        step()
        order.append("step")

    engine.step = watched_step
    within_a_step(engine, lambda: driver.close(lambda: order.append("end")))
    driver.submit(call)
    finish(call)
    wait_until(lambda: not driver_threads())
    assert order == ["step", "end"]
    assert call.ended_as == "this LLM was closed"
    with pytest.raises(EngineClosedError):
        driver.submit(call)


def test_closing_without_patience_is_done_by_the_drivers_own_thread():
    engine = make_engine(num_pages=200)
    slow_down(engine, 0.2)
    driver = make_driver(engine)
    call, closed_by = Call([make_request([1, 2], 150)]), []
    driver.submit(call)
    wait_until(lambda: engine.scheduler.running)
    (thread,) = driver_threads()
    driver.close(lambda: closed_by.append(threading.current_thread()), patience=0.01)
    assert not closed_by
    finish(call)
    thread.join()
    assert closed_by == [thread]
    driver.close(lambda: closed_by.append(threading.current_thread()))
    assert closed_by == [thread, threading.current_thread()]


def test_the_thread_is_no_daemon_whoever_starts_it():
    engine = make_engine(num_pages=200)
    slow_down(engine)
    driver = make_driver(engine)
    call = Call([make_request([1, 2], 150)], every_token=True)
    starter = threading.Thread(target=driver.submit, args=(call,), daemon=True)
    starter.start()
    starter.join()
    assert [thread.daemon for thread in driver_threads()] == [False]
    driver.abort(call)


def test_calling_from_within_a_step_is_refused():
    engine = make_engine()
    driver = make_driver(engine)
    run, errors = engine.runner.launch, []

    def run_and_call_back(step):
        with contextlib.suppress(SGLiteError):
            driver.submit(Call([make_request([1])]))
            errors.append("was accepted")
        return run(step)

    engine.runner.launch = run_and_call_back
    call = Call([make_request([1, 2])])
    driver.submit(call)
    finish(call)
    assert not errors
    assert call.requests[0].error is None


def test_an_error_that_is_no_exception_reaches_every_caller():
    engine = make_engine()

    class Panic(BaseException):
        pass

    def panic(step):
        raise Panic("outside of Exception")

    run, engine.runner.launch = engine.runner.launch, panic
    driver = make_driver(engine)
    call = Call([make_request([1, 2]), make_request([3])])
    driver.submit(call)
    finish(call)
    for request in call.requests:
        assert isinstance(request.error, RequestError)
        assert isinstance(request.error.__cause__, Panic)
    engine.runner.launch = run
    again = Call([make_request([1, 2])])
    driver.submit(again)
    finish(again)
    assert again.requests[0].output_token_ids == expected_output([1, 2], 8)


def test_an_abort_that_fails_leaves_nobody_waiting():
    engine = make_engine(num_pages=200)
    slow_down(engine)

    def broken(request):
        raise RuntimeError("planted")

    engine.abort = broken
    driver = make_driver(engine)
    calls = [Call([make_request([1, 2], 150)]), Call([make_request([3, 4], 150)])]
    for call in calls:
        driver.submit(call)
    driver.abort(calls[0])
    finish(calls[1])
    for call in calls:
        assert "planted" in str(call.requests[0].error)
    wait_until(lambda: not driver_threads())
    check_pages(engine)


_ABANDON = """
import sys, time
sys.path.insert(0, {root!r})
from tests.engine.test_driver import *
engine = make_engine(num_pages=20000)
slow_down(engine, 0.01)
driver = make_driver(engine)
call = Call([make_request([1, 2], 60000)], every_token={every_token})
def work():
    driver.submit(call)
    {then}
if {daemon}:
    threading.Thread(target=work, daemon=True).start()
else:
    work()
wait_until(lambda: call.requests[0].output_token_ids)
print("running", flush=True)
"""


@pytest.mark.parametrize(
    ("daemon", "then", "every_token"), [(False, "pass", True), (True, "finish(call)", False)]
)
def test_the_interpreter_exits_at_once_with_a_call_left_running(request, daemon, then, every_token):
    script = _ABANDON.format(
        root=str(request.config.rootpath), daemon=daemon, then=then, every_token=every_token
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"running\n"
        # The call has ten minutes of steps before it.
        assert process.wait(timeout=300) == 0
