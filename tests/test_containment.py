"""What fails in a real model's step fails the requests in it; the next call gets its tokens."""

import threading

import pytest
import torch

from sglite import LLM, GenerationError, InvalidRequestError, RequestError, SamplingParams, ops
from tests.engine.test_driver import driver_threads, wait_until
from tests.faults import Fault, Planted

PROMPTS = ["What is 17 + 25?", "Count from 3 to 12.", "The capital of France is"]
# Between them, most of what a step can be asked for.
PARAMS = [
    SamplingParams(temperature=0, max_new_tokens=8, stop="zzz", logprobs=1),
    SamplingParams(temperature=1, seed=3, max_new_tokens=9, top_k=5, repetition_penalty=1.1),
    SamplingParams(temperature=0, max_new_tokens=8, prompt_logprobs=0, bad_words=["Rome"]),
]


@pytest.fixture(scope="module")
def llm():
    with LLM("demo", kv_cache_tokens=1024, chunked_prefill_size=8) as model:
        yield model


def generate(llm):
    outputs = llm.generate(PROMPTS, PARAMS)
    wait_until(lambda: not driver_threads())
    return [(output.text, output.token_ids, output.logprobs) for output in outputs]


def was_planted(error):
    """Whether the fault is behind an error, at whatever distance."""
    while error is not None and not isinstance(error, Planted):
        error = error.__cause__
    return error is not None


def check_next_call(llm, expected):
    wait_until(lambda: not driver_threads())
    stats = llm.stats()
    assert stats["running"] == stats["waiting"] == 0
    llm._open.engine.scheduler.cache.check_invariant()
    assert generate(llm) == expected


@pytest.fixture(scope="module")
def expected(llm):
    return generate(llm)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("planted"),
        torch.OutOfMemoryError("planted"),
        MemoryError("planted"),
        SystemExit("planted"),
        Planted("planted"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_forward_that_raises_at_step_k(llm, expected, error, monkeypatch):
    forward = llm.model.forward
    for step in range(1, 8):
        calls = []

        def failing(*arguments, calls=calls, step=step):
            calls.append(1)
            if len(calls) == step:
                raise error
            return forward(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(llm.model, "forward", failing)
            with pytest.raises(GenerationError, match="planted") as caught:
                llm.generate(PROMPTS, PARAMS)
        failed = [output for output in caught.value.outputs if output.error]
        assert failed
        assert all(output.error.__cause__ is error for output in failed)
        check_next_call(llm, expected)


class UnprintableError(Exception):
    """What somebody's own code may raise."""

    def __str__(self):
        raise RuntimeError("no text")


def test_an_error_that_cannot_be_printed_fails_those_concerned(llm, expected, monkeypatch):
    def broken(*arguments):
        raise UnprintableError

    with pytest.raises(GenerationError, match="cannot be printed") as caught:
        llm.generate(PROMPTS, [{"logits_processors": [broken]}, PARAMS[1], PARAMS[2]])
    assert [output.error is None for output in caught.value.outputs] == [False, True, True]
    with monkeypatch.context() as patch:
        patch.setattr(llm.model, "forward", broken)
        with pytest.raises(GenerationError, match="cannot be printed"):
            llm.generate(PROMPTS, PARAMS)
    check_next_call(llm, expected)


def test_a_check_of_a_kernel_that_fails_at_step_k(llm, expected, monkeypatch):
    """Not Python's error but one that C++ has thrown."""
    forward = llm.model.forward
    for step in (1, 4):
        calls = []

        def failing(input_ids, positions, batch, calls=calls, step=step):
            calls.append(1)
            if len(calls) == step:
                ops.rms_norm(torch.ones(2, 8), torch.ones(9), 1e-5)
            return forward(input_ids, positions, batch)

        with monkeypatch.context() as patch:
            patch.setattr(llm.model, "forward", failing)
            with pytest.raises(GenerationError, match="rms_norm") as caught:
                llm.generate(PROMPTS, PARAMS)
        causes = [output.error.__cause__ for output in caught.value.outputs if output.error]
        assert causes
        assert all(isinstance(cause, ValueError) for cause in causes)
        check_next_call(llm, expected)


def test_log_probabilities_of_a_prompt_that_was_cut_off_stand_where_they_belong(llm, monkeypatch):
    prompt = "Count from 3 to 12, and then from 3 to 12 again."
    params = {"temperature": 0, "max_new_tokens": 1, "prompt_logprobs": 1}
    whole = llm.generate(prompt, params).prompt_logprobs
    start = 5
    for first, options in ((1, {}), (start, {"prompt_logprobs_start": start})):
        calls, forward = [], llm.model.forward

        def failing(*arguments, calls=calls, forward=forward):
            calls.append(1)
            if len(calls) == 2:
                raise RuntimeError("planted")
            return forward(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(llm.model, "forward", failing)
            with pytest.raises(GenerationError, match="planted") as caught:
                llm.generate(prompt, {**params, **options})
        (output,) = caught.value.outputs
        found = output.prompt_logprobs
        known = [position for position, entry in enumerate(found) if entry is not None]
        assert known == list(range(first, first + len(known)))
        assert 0 < len(known) < len(whole) - first
        for position in known:
            token = output.prompt_token_ids[position]
            assert found[position][token] == whole[position][token]
        scores = output["meta_info"]["input_token_logprobs"]
        assert [entry[0] is not None for entry in scores] == [entry is not None for entry in found]


def test_an_exception_at_any_line_of_the_engine(llm, expected):
    for at in range(40, 4000, 97):
        with Fault(at).planted() as fault:
            try:
                llm.generate(PROMPTS, PARAMS)
            except GenerationError as error:
                for output in error.outputs:
                    assert output.error is None or was_planted(output.error), fault.where
        check_next_call(llm, expected)


class Rust:
    """A tokenizer's inner half, some calls of which fail."""

    def __init__(self, inner, error, times):
        self._inner = inner
        self._error = error
        self.times = times

    def decode(self, *arguments, **keywords):
        if self.times > 0:
            self.times -= 1
            raise self._error
        return self._inner.decode(*arguments, **keywords)


def test_a_tokenizer_that_is_borrowed_for_a_moment_is_waited_for(llm, expected, monkeypatch):
    inner = llm._open.intake._tokenizer._backend
    rust = Rust(inner, RuntimeError("Already borrowed"), times=5)
    monkeypatch.setattr(llm._open.intake._tokenizer, "_backend", rust)
    assert generate(llm) == expected
    assert rust.times == 0


def test_a_panic_while_decoding_fails_that_text(llm, expected, monkeypatch):
    tokenizer = llm._open.intake._tokenizer
    with monkeypatch.context() as patch:
        patch.setattr(tokenizer, "_backend", Rust(tokenizer._backend, Planted("panicked"), 10**9))
        for generating in (
            lambda: llm.generate(PROMPTS[1], temperature=0, max_new_tokens=5),
            lambda: list(llm.stream(PROMPTS[1], temperature=0, max_new_tokens=5)),
            lambda: llm.generate(PROMPTS[1], temperature=0, max_new_tokens=5, logprobs=1),
        ):
            with pytest.raises((GenerationError, RequestError), match="panicked"):
                generating()
    check_next_call(llm, expected)


@pytest.mark.parametrize("asks", [{"logprobs": 1}, {"prompt_logprobs": 0}])
def test_a_panic_over_log_probabilities_fails_their_request_only(llm, expected, monkeypatch, asks):
    tokenizer = llm._open.intake._tokenizer
    params = [SamplingParams(temperature=0, max_new_tokens=5) for _ in PROMPTS]
    alone = [output.token_ids for output in llm.generate(PROMPTS, params)]
    params[1] = SamplingParams(temperature=0, max_new_tokens=5, **asks)

    def panic(token_id):
        raise Planted("panicked")

    with monkeypatch.context() as patch:
        patch.setattr(tokenizer, "decode_one", panic)
        patch.setattr(llm._open.engine.runner.sampler, "_texts", {})
        with pytest.raises(GenerationError, match="panicked") as caught:
            llm.generate(PROMPTS, params)
    outputs = caught.value.outputs
    assert [output.error is None for output in outputs] == [True, False, True]
    assert [outputs[0].token_ids, outputs[2].token_ids] == [alone[0], alone[2]]
    check_next_call(llm, expected)


def test_a_panic_while_encoding_is_an_exception_of_its_caller(llm, expected, monkeypatch):
    def panic(*arguments, **keywords):
        raise Planted("panicked")

    with monkeypatch.context() as patch:
        patch.setattr(llm.tokenizer, "encode", panic)
        with pytest.raises(RequestError, match="panicked"):
            llm.generate(PROMPTS[0])
        patch.setattr(llm.tokenizer, "apply_chat_template", panic)
        with pytest.raises(InvalidRequestError, match="panicked"):
            llm.chat([{"role": "user", "content": "Hi"}])
    check_next_call(llm, expected)


def test_a_host_that_uses_the_tokenizer_meanwhile(llm, expected):
    """Padding and truncation of a fast tokenizer are settings of it, which exclude other use."""
    done, errors = threading.Event(), []

    def use():
        while not done.is_set():
            try:
                llm.tokenizer(["one two", "three"], padding=True, truncation=True, max_length=100)
            except RuntimeError as error:  # it may meet us in the middle of a decode as well
                if "borrowed" not in str(error):
                    errors.append(error)

    llm.tokenizer.pad_token = llm.tokenizer.eos_token
    thread = threading.Thread(target=use)
    thread.start()
    try:
        for _ in range(15):
            texts = [chunk.text for chunk in llm.stream(PROMPTS[1], temperature=0)]
            assert "".join(texts) == llm.generate(PROMPTS[1], temperature=0).text
    finally:
        done.set()
        thread.join()
    assert not errors
    check_next_call(llm, expected)


def test_an_exception_in_one_thread_reaches_no_other(llm, expected):
    def broken(token_ids, logits):
        raise ValueError("mine")

    failures, answers = [], []

    def fail():
        for _ in range(5):
            with pytest.raises(GenerationError, match="mine") as caught:
                llm.generate("Hi", logits_processors=[broken])
            failures.append(caught.value)

    def succeed():
        answers.extend(generate_without_waiting(llm) for _ in range(5))

    threads = [threading.Thread(target=work) for work in (fail, succeed, fail, succeed)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(failures) == 10
    assert answers == [expected] * 10


def generate_without_waiting(llm):
    outputs = llm.generate(PROMPTS, PARAMS)
    return [(output.text, output.token_ids, output.logprobs) for output in outputs]
