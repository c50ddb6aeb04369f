"""Ctrl-C ends a call and loses nothing: the next call works, and `resume` goes on with the same
tokens."""

import os
import signal
import threading
import time
from contextlib import contextmanager

import pytest

from sglite import LLM, EngineClosedError, InvalidRequestError, SamplingParams
from tests.children import run_in_child

PROMPTS = ["Hi", "Count from 3 to 12.", "What is the capital of Japan?"] * 2
PARAMS = [
    SamplingParams(temperature=1.2, seed=index, max_new_tokens=90, ignore_eos=True, logprobs=1)
    for index in range(6)
]
CHAT = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]


def facts(outputs):
    """All that must not depend on whether there was an interrupt."""
    return [
        (
            [
                (c.text, c.token_ids, c.logprobs, c.finish_reason, c.stop_reason)
                for c in out.outputs
            ],
            out.prompt_logprobs,
            out.prompt,
        )
        for out in outputs
    ]


class Interrupter:
    """Sends SIGINT to this process within a step, and knows when that step ended.

    Attributes:
        step_ended: the time, or when the signal was sent while that step lasts.
    """

    def __init__(self, llm):
        self._left = 0
        self.step_ended = 0.0
        step = llm._open.engine.step

        def interrupted_step():
            self._left -= 1
            if self._left == 0:
                self.step_ended = time.perf_counter()
                os.kill(os.getpid(), signal.SIGINT)
            step()
            if self._left == 0:
                self.step_ended = time.perf_counter()

        llm._open.engine.step = interrupted_step

    def in_step(self, number):
        """The signal comes in that step from now on, counted from 1."""
        self._left = number


def interrupt_every_kind_of_call():
    """A child process: calls of every kind are interrupted, and resumed."""
    with LLM("demo", kv_cache_tokens=8192) as llm:
        interrupter = Interrupter(llm)

        def stream():
            return list(llm.stream(PROMPTS, PARAMS))

        kinds = {
            "generate": lambda: llm.generate(PROMPTS, PARAMS),
            "chat": lambda: llm.chat(CHAT, PARAMS),
            "stream": stream,
        }
        expected = {
            "generate": facts(llm.generate(PROMPTS, PARAMS)),
            "chat": facts(llm.chat(CHAT, PARAMS)),
        }
        expected["stream"] = expected["generate"]
        for name, call in kinds.items():
            waited = []
            for step in (2, 21, 61):
                # Once is enough: what another process delays is no promise broken.
                for _ in range(5):
                    interrupter.in_step(step)
                    try:
                        call()
                    except KeyboardInterrupt:
                        seconds = time.perf_counter() - interrupter.step_ended
                    else:
                        raise AssertionError(f"{name}: no KeyboardInterrupt")
                    so_far = llm.interrupted or []
                    are_aborted = [out.finish_reason for out in so_far] == ["abort"] * 6
                    if seconds < 0.2 and are_aborted:
                        break
                waited.append(seconds)
                stats = llm.stats()
                assert stats["running"] == stats["waiting"] == 0
                llm._open.engine.scheduler.cache.check_invariant()
                assert are_aborted, so_far
                for out, whole in zip(so_far, expected[name], strict=True):
                    tokens = whole[0][0][1]
                    assert out.token_ids == tokens[: len(out.token_ids)]
                    assert len(out.token_ids) < len(tokens)
                assert step < 20 or all(out.token_ids for out in so_far)
                # What was computed is in the tree: only the last token of each is not.
                cached = llm.stats()["cached_tokens"]
                longest = max(so_far, key=lambda out: len(out.token_ids))
                again = longest.prompt_token_ids + longest.token_ids
                llm.generate(again, temperature=0, max_new_tokens=1)
                assert llm.stats()["cached_tokens"] - cached >= len(again) - 2
                assert facts(llm.resume()) == expected[name], name
                assert llm.interrupted is None
            print(name, "raised after", [f"{seconds:.4f}" for seconds in waited])
            assert max(waited) < 0.2, waited
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_every_kind_of_call_in_a_real_process():
    printed = run_in_child(interrupt_every_kind_of_call)
    assert [line.split()[0] for line in printed.splitlines()] == ["generate", "chat", "stream"]


def interrupt_again_and_again():
    """A child process: interrupts fall anywhere, into each other's handling and into `resume`."""
    with LLM("demo", kv_cache_tokens=8192) as llm:
        answers, interrupts, done, inside = [], 0, None, False
        expected = facts(llm.generate(PROMPTS, PARAMS))
        thread = threading.Thread(
            target=lambda: answers.extend(facts(llm.generate(PROMPTS, PARAMS)) for _ in range(2))
        )
        thread.start()
        stop = threading.Event()

        def disturb():
            while not stop.wait(0.03):
                os.kill(os.getpid(), signal.SIGINT)

        disturber = threading.Thread(target=disturb)

        def raise_inside(number, frame):
            if inside:  # not in this test's own lines
                raise KeyboardInterrupt

        signal.signal(signal.SIGINT, raise_inside)
        disturber.start()
        while done is None and interrupts < 30:
            try:
                inside = True
                done = llm.generate(PROMPTS, PARAMS) if llm.interrupted is None else llm.resume()
                inside = False
            except KeyboardInterrupt:
                inside = False
                interrupts += 1
        stop.set()
        disturber.join()
        assert facts(done or llm.resume()) == expected
        thread.join()
        assert answers == [expected] * 2, "an interrupt reached another thread"
        print(interrupts)


def test_interrupts_that_fall_anywhere_lose_nothing():
    assert int(run_in_child(interrupt_again_and_again)) > 0


@pytest.fixture(scope="module")
def llm():
    with LLM("demo", kv_cache_tokens=2048) as model:
        yield model


@contextmanager
def slow_steps(llm):
    """So that a stream is closed before its last step, however busy the machine is."""
    engine = llm._open.engine
    step = engine.step

    def after_a_while(*arguments):
        time.sleep(0.03)
        return step(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "step", after_a_while)
        yield


@pytest.mark.parametrize(
    "parameters",
    [
        {"temperature": 0, "stop": "9 1", "max_new_tokens": 40},
        {"temperature": 1.5, "n": 3, "seed": 4, "max_new_tokens": 30, "ignore_eos": True},
        {"temperature": 0, "prompt_logprobs": 1, "logprobs": 2, "max_new_tokens": 30},
        {
            "temperature": 0.9,
            "seed": 2,
            "repetition_penalty": 1.3,
            "frequency_penalty": 0.4,
            "min_new_tokens": 20,
            "max_new_tokens": 30,
            "bad_words": ["5", "six"],
        },
    ],
)
@pytest.mark.parametrize("chunks", [1, 2, 9])
def test_resuming_gives_the_uninterrupted_result(llm, parameters, chunks):
    prompts = ["Count from 3 to 12.", "Count from 5 to 14."]
    expected = facts(llm.generate(prompts, **parameters))
    with slow_steps(llm):
        stream = llm.stream(prompts, **parameters)
        for _ in range(chunks):
            next(stream)
        stream.close()
    assert isinstance(llm.interrupted, list)
    assert facts(llm.resume()) == expected


def test_a_single_prompt_is_resumed_as_one(llm):
    expected = llm.generate("Count from 3 to 12.", temperature=0)
    with slow_steps(llm):
        stream = llm.stream("Count from 3 to 12.", temperature=0)
        first = next(stream)
        stream.close()
    assert expected.text.startswith(first.text)
    assert llm.interrupted.token_ids[:1] == first.token_ids[:1]
    assert llm.resume().text == expected.text


def test_there_is_nothing_to_resume_after_a_call_that_went_through(llm):
    assert llm.interrupted is None
    list(llm.stream("Hi", temperature=0))
    assert llm.interrupted is None
    with pytest.raises(InvalidRequestError, match="nothing to resume"):
        llm.resume()
    with LLM("demo", kv_cache_tokens=64) as closed:
        pass
    with pytest.raises(EngineClosedError):
        closed.resume()
