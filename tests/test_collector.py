"""Python's collector ends what was forgotten in any thread, at any moment: nothing hangs by it."""

import gc
import threading
import weakref

import pytest

from sglite import LLM
from tests.children import run_in_child
from tests.engine.test_driver import driver_threads, wait_until

ENDLESS = {"ignore_eos": True, "max_new_tokens": 400}


def forget_a_stream(llm, **parameters):
    """Leaves a stream under way that only the collector can find."""
    cell = [llm.stream("Hi", **ENDLESS, **parameters)]
    cell.append(cell)
    next(cell[0])


def collecting(token_ids, logits):
    """A logits processor."""
    gc.collect()
    return logits


def collect_within_a_step():
    """In the child process: the driver's thread finds the stream."""
    with LLM("demo", kv_cache_tokens=2048) as llm:
        expected = llm.generate("Hi", temperature=0).token_ids
        forget_a_stream(llm)
        found = llm.generate("Hi", temperature=0, logits_processors=[collecting])
        assert found.token_ids == expected
        wait_until(lambda: llm.stats()["running"] == 0)
        assert llm.interrupted is None


def collect_while_tokenizing():
    """In the child process: a thread that has the tokenizer, for which a step waits."""
    with LLM("demo", kv_cache_tokens=2048) as llm:
        expected = llm.generate("Hi", temperature=0).token_ids
        encode = llm.tokenizer.encode

        def encode_and_collect(*arguments, **keywords):
            gc.collect()
            return encode(*arguments, **keywords)

        llm.tokenizer.encode = encode_and_collect
        for _ in range(3):
            forget_a_stream(llm)
            assert llm.generate("Hi", temperature=0).token_ids == expected
        wait_until(lambda: llm.stats()["running"] == 0)


class CollectingLock:
    """A lock that whoever has it collects."""

    def __init__(self, lock):
        self._lock = lock

    def __enter__(self):
        self._lock.__enter__()
        gc.collect()

    def __exit__(self, *exception):
        self._lock.__exit__(*exception)


def collect_with_the_lock():
    """In the child process: a thread that has the driver's lock."""
    with LLM("demo", kv_cache_tokens=2048) as llm:
        forget_a_stream(llm)
        llm._open.driver._lock = CollectingLock(llm._open.driver._lock)
        llm.generate("Hi", temperature=0)
        wait_until(lambda: llm.stats()["running"] == 0)


def collect_the_llm_too():
    """In the child process: a step finds its own LLM, which nobody has any more."""
    llm = LLM("demo", kv_cache_tokens=2048)
    engine = llm._open.engine
    gone = [weakref.ref(part) for part in (engine, engine.runner.model, engine.runner.pool)]
    del engine
    may_collect = threading.Event()

    def collect_then(token_ids, logits):
        if may_collect.is_set():
            gc.collect()
        return logits

    forget_a_stream(llm, logits_processors=[collect_then])
    del llm
    may_collect.set()
    wait_until(lambda: not driver_threads())
    del collect_then
    gc.collect()
    assert [reference() for reference in gone] == [None] * 3


def collect_everywhere():
    """A child process of the tests, as what fails here hangs."""
    gc.disable()
    for collect in (
        collect_within_a_step,
        collect_while_tokenizing,
        collect_with_the_lock,
        collect_the_llm_too,
    ):
        collect()
        print(collect.__name__)


@pytest.fixture(scope="module")
def printed():
    return run_in_child(collect_everywhere).split()


def test_in_the_thread_of_the_steps(printed):
    assert "collect_within_a_step" in printed


def test_in_a_thread_that_has_the_tokenizer(printed):
    assert "collect_while_tokenizing" in printed


def test_in_a_thread_that_has_the_drivers_lock(printed):
    assert "collect_with_the_lock" in printed


def test_an_llm_in_the_thread_of_its_own_steps(printed):
    assert "collect_the_llm_too" in printed


def test_a_stream_that_another_thread_finds_is_no_interrupt_of_its():
    gc.collect()
    gc.disable()
    found = []
    try:
        with LLM("demo", kv_cache_tokens=2048) as llm:
            forget_a_stream(llm)

            def collect():
                gc.collect()
                found.append(llm.interrupted)

            thread = threading.Thread(target=collect)
            thread.start()
            thread.join()
            assert found == [None]
            assert llm.interrupted is None
            wait_until(lambda: llm.stats()["running"] == 0)
            forget_a_stream(llm)
            gc.collect()
            assert llm.interrupted.finish_reason == "abort"
    finally:
        gc.enable()
