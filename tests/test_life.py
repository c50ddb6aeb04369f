"""Everything is given back: after `close`, `with`, `del`, and a constructor that failed."""

import atexit
import gc
import json
import subprocess
import sys
import threading
import weakref

import pytest
import torch

from sglite import LLM, CheckpointError, GenerationError, OutOfMemoryError
from sglite.cache.kv_pool import KVPool
from sglite.engine.device import EngineThread
from sglite.engine.engine import Engine
from tests.checkpoints import make_checkpoint
from tests.children import ROOT
from tests.engine.test_driver import driver_threads, wait_until

QUESTION = "What is 17 + 25?"


@pytest.fixture
def no_collector():
    """Without the collector of cycles, only what is in no cycle goes."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def watch(llm):
    engine = llm._open.engine
    return [weakref.ref(part) for part in (engine, engine.runner.model, engine.runner.pool)]


def use_and_leave(llm):
    llm.generate([QUESTION] * 3, temperature=0, logprobs=1, stop="zz")
    list(llm.stream(QUESTION, temperature=0))


def fail_a_step(llm):
    def failing(*arguments):
        raise torch.OutOfMemoryError("planted")

    llm.model.forward = failing
    with pytest.raises(GenerationError):
        llm.generate(QUESTION)
    del llm.model.forward


def leave_a_stream(llm):
    stream = llm.stream(QUESTION, ignore_eos=True, max_new_tokens=400)
    next(stream)
    stream.close()
    assert llm.interrupted is not None


def check_the_invariance(llm):
    assert llm.check_invariance([[5, 6, 7]], new_tokens=2, batch_sizes=[2], chunk_sizes=[2])


@pytest.mark.parametrize("use", [use_and_leave, fail_a_step, leave_a_stream, check_the_invariance])
@pytest.mark.parametrize("end", ["del", "close", "with"])
def test_nothing_is_left(use, end, no_collector):
    llm = LLM("demo", kv_cache_tokens=512)
    watched = watch(llm)
    use(llm)
    wait_until(lambda: not driver_threads())
    if end == "close":
        llm.close()
        llm.close()
    elif end == "with":
        with llm:
            pass
    else:
        del llm
    assert [reference() for reference in watched] == [None] * 3


def test_del_while_another_thread_generates(no_collector):
    llm = LLM("demo", kv_cache_tokens=2048)
    watched = watch(llm)
    thread = threading.Thread(
        target=llm.generate, args=("Hi",), kwargs={"ignore_eos": True, "max_new_tokens": 200}
    )
    thread.start()
    del llm
    thread.join()  # which held the last reference
    del thread
    wait_until(lambda: [reference() for reference in watched] == [None] * 3)


FAILING = "\n".join(
    [
        "def failing(*arguments):",
        "    raise MemoryError('planted')",
        "llm.model.forward = failing",
        "{}",
    ]
)
INTERRUPTED = "\n".join(
    [
        "def interrupted(call, *arguments):",
        "    raise KeyboardInterrupt",
        "llm._open.driver.wait = interrupted",
        "{}",
    ]
)
AWAITED = "\n".join(
    [
        "import asyncio",
        "async def read():",
        "    async for chunk in llm.astream('Hi'):",
        "        pass",
        "asyncio.run(read())",
    ]
)
CANCELLED = "\n".join(
    [
        "import asyncio",
        "async def main():",
        "    endless = {'ignore_eos': True, 'max_new_tokens': 400}",
        "    await asyncio.wait_for(llm.agenerate('Hi', **endless), 0.01)",
        "asyncio.run(main())",
    ]
)


# So long that it is read on a thread of the loop's pool, and refused there.
LONG = "'Hi' * 20_000"
CANCELLED_READING = "\n".join(
    [
        "import asyncio, time",
        "read = llm._open.intake.reader.read",
        "def slow(*arguments):",
        "    time.sleep(1)",
        "    return read(*arguments)",
        "llm._open.intake.reader.read = slow",
        "async def main():",
        f"    await asyncio.wait_for(llm.agenerate({LONG}), 0.05)",
        "asyncio.run(main())",
    ]
)


@pytest.mark.parametrize(
    "cell",
    [
        FAILING.format("llm.generate('Hi')"),
        FAILING.format("llm.chat([{'role': 'user', 'content': 'Hi'}])"),
        FAILING.format("list(llm.stream('Hi'))"),
        FAILING.format("import asyncio\nasyncio.run(llm.agenerate('Hi'))"),
        FAILING.format(AWAITED),
        FAILING.format("llm.check_invariance([[5, 6, 7]], new_tokens=2)"),
        INTERRUPTED.format("llm.generate('Hi')"),
        INTERRUPTED.format("list(llm.stream('Hi'))"),
        INTERRUPTED.format("llm.generate(['Hi'] * 3, progress=True)"),
        CANCELLED,
        CANCELLED_READING,
        f"import asyncio\nasyncio.run(llm.agenerate({LONG}))",
        AWAITED.replace("'Hi'", LONG),
        "llm.generate('Hi', temperature=-1)",
        "llm.generate({'text': 'Hi', 'images': [1]})",
        "llm.stream([10**9])",
        "llm.chat([{'role': 'nobody', 'content': [{'type': 'smell'}]}])",
        "llm.resume()",
    ],
)
def test_an_error_that_is_kept_keeps_no_engine(cell, no_collector):
    """As a notebook keeps the last one, with the frames of its traceback."""
    names = {"llm": LLM("demo", kv_cache_tokens=512)}
    watched = watch(names["llm"])
    with pytest.raises(BaseException) as kept:  # noqa: PT011
        exec(cell, names)
    wait_until(lambda: not driver_threads())
    del names["llm"]
    assert kept.value.__traceback__ is not None
    assert [reference() for reference in watched] == [None] * 3


def spy_on_requests(llm):
    """Weak references to all requests that are made from now on."""
    requests, make = [], llm._open.intake.make_group

    def make_group(*arguments, **keywords):
        group = make(*arguments, **keywords)
        requests.extend(weakref.ref(request) for request in group.requests)
        return group

    llm._open.intake.make_group = make_group
    return requests


@pytest.mark.parametrize(
    "parameters",
    [{}, {"n": 3}, {"logits_processors": [lambda ids, logits: logits]}, {"prompt_logprobs": 1}],
)
def test_requests_are_let_go_when_a_batch_has_ended(parameters, no_collector):
    with LLM("demo", kv_cache_tokens=512) as llm:
        requests = spy_on_requests(llm)
        llm.generate([QUESTION, "Hi"], max_new_tokens=5, **parameters)
        wait_until(lambda: not driver_threads())
        assert len(requests) >= 2
        assert [reference() for reference in requests] == [None] * len(requests)
        assert "42" in llm.generate(QUESTION, temperature=0).text


def break_the_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{}")


def cut_the_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


@pytest.mark.parametrize(
    ("spoil", "options", "error"),
    [
        (break_the_tokenizer, {}, CheckpointError),
        (cut_the_weights, {}, CheckpointError),
        (lambda folder: None, {"kv_cache_tokens": 10**13}, OutOfMemoryError),
    ],
)
def test_a_constructor_that_fails_leaves_nothing(spoil, options, error, tmp_path, no_collector):
    make_checkpoint(tmp_path, "llama")
    spoil(tmp_path)
    kinds = (Engine, KVPool, torch.nn.Module)
    gc.collect()
    before = sum(isinstance(thing, kinds) for thing in gc.get_objects())
    with pytest.raises(error) as kept:  # the error itself stays, as it does in a notebook
        LLM(tmp_path, **options)
    assert kept.value.__traceback__ is not None
    assert sum(isinstance(thing, kinds) for thing in gc.get_objects()) == before
    assert [t.name for t in threading.enumerate() if t.name.startswith("sglite")] == []


def test_a_constructor_that_fails_gives_its_stream_back(monkeypatch):
    closed = []
    close = EngineThread.close

    def watched_close(thread):
        closed.append(thread)
        close(thread)

    monkeypatch.setattr(EngineThread, "close", watched_close)
    with pytest.raises(OutOfMemoryError):
        LLM("demo", kv_cache_tokens=10**13)
    assert len(closed) == 1


def test_a_constructor_that_fails_on_the_cpu_leaves_gpus_alone(monkeypatch):
    def empty():
        raise AssertionError("this is the program's own memory")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", empty)
    with pytest.raises(OutOfMemoryError):
        LLM("demo", kv_cache_tokens=10**13, device="cpu")


def test_no_exit_hook_is_added():
    LLM("demo", kv_cache_tokens=64).close()
    before = atexit._ncallbacks()
    with LLM("demo", kv_cache_tokens=64) as llm:
        llm.generate(QUESTION, max_new_tokens=2)
        assert atexit._ncallbacks() == before


def test_two_models_of_different_kinds_at_the_same_time(tmp_path):
    make_checkpoint(tmp_path, "gemma2", dtype=torch.bfloat16)
    with LLM(tmp_path, kv_cache_tokens=512) as other, LLM("demo", kv_cache_tokens=512) as llm:
        expected = [model.generate([5, 6, 7], temperature=0).token_ids for model in (other, llm)]
        found = {}

        def work(name, model):
            found[name] = [model.generate([5, 6, 7], temperature=0).token_ids for _ in range(5)]

        threads = [threading.Thread(target=work, args=pair) for pair in enumerate((other, llm))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [found[0], found[1]] == [[tokens] * 5 for tokens in expected]
        other.close()
        assert llm.generate([5, 6, 7], temperature=0).token_ids == expected[1]


def test_many_lives_leave_no_memory_behind():
    """The short form of `make lives`."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.many_lives", "--count", "20", "--most-growth", "0.05"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["growth"] < 0.05
