"""Python's collector ends what was forgotten in any thread, at any moment: nothing hangs by it."""

import gc
import threading
import weakref

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
    """A child process of the tests: the driver's thread finds the stream."""
    gc.disable()
    with LLM("demo", kv_cache_tokens=2048) as llm:
        expected = llm.generate("Hi", temperature=0).token_ids
        forget_a_stream(llm)
        found = llm.generate("Hi", temperature=0, logits_processors=[collecting])
        assert found.token_ids == expected
        wait_until(lambda: llm.stats()["running"] == 0)
        assert llm.interrupted is None
    print("done")


def test_in_the_thread_of_the_steps():
    assert run_in_child(collect_within_a_step, timeout=60) == "done\n"


def collect_while_tokenizing():
    """A child process of the tests: a thread that has the tokenizer, for which a step waits."""
    gc.disable()
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
    print("done")


def test_in_a_thread_that_has_the_tokenizer():
    assert run_in_child(collect_while_tokenizing, timeout=60) == "done\n"


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
    """A child process of the tests: a thread that has the driver's lock."""
    gc.disable()
    with LLM("demo", kv_cache_tokens=2048) as llm:
        forget_a_stream(llm)
        llm._driver._lock = CollectingLock(llm._driver._lock)
        llm.generate("Hi", temperature=0)
        wait_until(lambda: llm.stats()["running"] == 0)
    print("done")


def test_in_a_thread_that_has_the_drivers_lock():
    assert run_in_child(collect_with_the_lock, timeout=60) == "done\n"


def collect_the_llm_too():
    """A child process of the tests: a step finds its own LLM, which nobody has any more."""
    gc.disable()
    llm = LLM("demo", kv_cache_tokens=2048)
    gone = [weakref.ref(part) for part in (llm._engine, llm.model, llm._engine.runner.pool)]
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
    print("done")


def test_an_llm_in_the_thread_of_its_own_steps():
    assert run_in_child(collect_the_llm_too, timeout=60) == "done\n"


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
