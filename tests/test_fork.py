"""After a fork the child works undisturbed, and is told clearly what it cannot have."""

import asyncio
import multiprocessing
import os
import sys
import threading
import time
import traceback

import pytest
import torch

from sglite import LLM, EngineClosedError, ops
from tests.children import run_in_child

QUESTION = "What is 17 + 25?"
ENDLESS = {"ignore_eos": True, "max_new_tokens": 400}


def in_fork(work):
    """Runs `work` in a fork of this process; the exit code must be 0."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    assert exit_code(child) == 0


def exit_code(child):
    """Waits for a child process, up to a few minutes."""
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, 9)
    os.waitpid(child, 0)
    raise AssertionError("the child hangs")


def compute():
    """Parallel regions of torch's and of ours."""
    x = torch.randn(512, 4096)
    assert (x @ x.T).shape == (512, 512)
    assert ops.rms_norm(x, torch.ones(4096), 1e-5).shape == x.shape


def fork_in_every_state():
    """A child process of the tests: forks while idle and while busy."""
    before = LLM("demo", kv_cache_tokens=2048)
    threads = torch.get_num_threads()
    compute()
    expected = before.generate(QUESTION, temperature=0).token_ids

    def use_the_parents():
        for use in (
            lambda: before.generate(QUESTION),
            lambda: before.chat([{"role": "user", "content": QUESTION}]),
            lambda: next(before.stream(QUESTION)),
            lambda: before.interrupted,
            before.resume,
            before.stats,
            before.describe,
            before.weights_changed,
        ):
            with pytest.raises(EngineClosedError, match="fork"):
                use()

    def make_a_new_one():
        with LLM("demo", kv_cache_tokens=2048) as own:
            assert own.generate(QUESTION, temperature=0).token_ids == expected

    def let_go():
        nonlocal before
        before.close()
        del before

    def import_and_exit():
        assert "sqlite3" not in sys.modules
        import sqlite3  # noqa: F401

        compute()

    def work():
        compute()
        use_the_parents()
        make_a_new_one()
        import_and_exit()
        let_go()

    in_fork(lambda: None)
    in_fork(work)
    busy = threading.Thread(target=lambda: before.generate(["Hi"] * 4, **ENDLESS))
    busy.start()
    while not before.stats()["steps"] > 20:
        time.sleep(0.001)
    in_fork(lambda: None)
    in_fork(work)
    busy.join()
    assert torch.get_num_threads() == threads
    assert before.generate(QUESTION, temperature=0).token_ids == expected
    before.close()
    print("done")


def test_a_fork_in_every_state():
    assert run_in_child(fork_in_every_state) == "done\n"


def use_streams_begun_before_the_fork():
    """A child process of the tests: what was half read goes no further, and nothing hangs."""
    llm = LLM("demo", kv_cache_tokens=2048)
    streams = [llm.stream(QUESTION, **ENDLESS) for _ in range(3)]
    for stream in streams:
        next(stream)

    def read():
        with pytest.raises(EngineClosedError, match="fork"):
            for _ in streams[0]:
                pass

    def leave():
        streams[1].close()
        streams.clear()

    def read_in_a_loop():
        async def main():
            with pytest.raises(EngineClosedError, match="fork"):
                async for _ in awaited:
                    pass

        loop = asyncio.new_event_loop()
        awaited = llm.astream(QUESTION, **ENDLESS)
        loop.run_until_complete(anext(awaited))
        in_fork(lambda: asyncio.new_event_loop().run_until_complete(main()))
        loop.run_until_complete(awaited.aclose())
        loop.close()

    in_fork(read)
    in_fork(leave)
    read_in_a_loop()
    use_streams_begun_before_the_fork.held = llm, streams
    child = os.fork()
    if child == 0:
        return  # and on to the interpreter's end, with streams and LLM alive
    assert exit_code(child) == 0
    assert list(streams[2])[-1].finish_reason == "length"
    llm.close()
    print("done")


def test_streams_begun_before_the_fork():
    assert run_in_child(use_streams_begun_before_the_fork) == "done\n"


class Prompts(torch.utils.data.Dataset):
    """Its items need torch, and the parent's tokenizer."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer

    def __len__(self):
        return 8

    def __getitem__(self, index):
        compute()
        return torch.tensor(self._tokenizer.encode(f"{index} {QUESTION}")[:5])


def load_data_beside_an_llm():
    """A child process of the tests: workers that are forked while the LLM is at work."""
    with LLM("demo", kv_cache_tokens=2048) as llm:
        expected = llm.generate(QUESTION, temperature=0).token_ids
        busy = threading.Thread(target=lambda: llm.generate(["Hi"] * 2, **ENDLESS))
        busy.start()
        loader = torch.utils.data.DataLoader(
            Prompts(llm.tokenizer),
            batch_size=2,
            num_workers=2,
            multiprocessing_context=multiprocessing.get_context("fork"),
        )
        assert [tuple(batch.shape) for batch in loader] == [(2, 5)] * 4
        assert llm.generate(QUESTION, temperature=0).token_ids == expected
        busy.join()
    print("done")


def test_workers_of_a_data_loader():
    assert run_in_child(load_data_beside_an_llm) == "done\n"
