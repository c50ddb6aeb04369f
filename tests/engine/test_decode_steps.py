"""Decode steps that keep their state give what steps that are laid out anew give."""

import pytest

from sglite import LLM, ops
from sglite.interface.errors import GenerationError

PROMPTS = [[index + 3, *range(5, 5 + 3 * index)] for index in range(9)]
# Without penalties and bans, so that the state serves; lengths differ, so that batches shrink.
PLAIN = [
    {"temperature": 0, "max_new_tokens": 20, "ignore_eos": True},
    {"temperature": 1.5, "seed": 5, "max_new_tokens": 40, "ignore_eos": True},
    {"temperature": 0.9, "seed": 6, "top_k": 5, "max_new_tokens": 17, "logprobs": 2},
    {"temperature": 0, "max_new_tokens": 1},
]
WITH_EDITS = [{"temperature": 0, "repetition_penalty": 1.3, "max_new_tokens": 12}]


def make_llm(keeps_state=True, **options):
    llm = LLM("demo", device="cpu", seed=3, **options)
    if not keeps_state:
        llm._open.engine.runner._decode = None
    return llm


def results(outputs):
    return [(out.token_ids, out.finish_reason, out.logprobs) for out in outputs]


@pytest.fixture
def advances(monkeypatch):
    """Grows by one entry for each step that moves a kept state on."""
    found = []
    advance = ops.advance
    monkeypatch.setattr(ops, "advance", lambda *args: found.append(1) or advance(*args))
    return found


@pytest.mark.parametrize("kinds", [PLAIN, PLAIN + WITH_EDITS])
@pytest.mark.parametrize("options", [{}, {"kv_cache_tokens": 96}, {"max_running_requests": 3}])
def test_the_same_tokens_as_laid_out_anew(options, kinds, advances):
    chosen = [kinds[index % len(kinds)] for index in range(len(PROMPTS))]
    expected = results(make_llm(keeps_state=False, **options).generate(PROMPTS, chosen))
    assert not advances
    llm = make_llm(**options)
    for _ in range(2):  # the second time out of the prefix cache
        assert results(llm.generate(PROMPTS, chosen)) == expected
    assert len(advances) > 20
    if "kv_cache_tokens" in options:
        assert llm.stats()["preemptions"] > 0
    llm._open.engine.scheduler.cache.check_invariant()


@pytest.mark.parametrize("start", [0, 33, 34])
@pytest.mark.parametrize("chunk", [1, 2, 512])
def test_prompt_logprobs_have_come_before_steps_that_only_decode(start, chunk, advances):
    prompt = list(range(5, 40))
    plain = {"temperature": 0, "max_new_tokens": 9, "ignore_eos": True}
    scored = {**plain, "prompt_logprobs": 1, "prompt_logprobs_start": start}
    expected = make_llm(keeps_state=False).generate(prompt, scored)
    assert not advances
    llm = make_llm(chunked_prefill_size=chunk)
    launch, steps = llm._open.engine.runner.launch, []

    def watched(step):
        if step.only_decodes:
            steps.append([item.request.misses_prompt_logprobs for item in step.items])
        return launch(step)

    llm._open.engine.runner.launch = watched
    for params in (scored, plain, scored):  # the last one with all in the cache that may be
        found = llm.generate(prompt, params)
    assert results([found]) == results([expected])
    assert found.prompt_logprobs == expected.prompt_logprobs
    assert len(steps) == len(advances) >= 3 * (plain["max_new_tokens"] - 1)
    assert not any(map(any, steps))


def test_a_step_that_fails_leaves_nothing_behind():
    llm = make_llm()
    model, steps = llm._open.engine.runner._decode._model, []

    def failing(*inputs):
        steps.append(1)
        if len(steps) == 4:
            raise RuntimeError("no more")
        return model(*inputs)

    expected = results(llm.generate(PROMPTS, PLAIN[0]))
    llm._open.engine.runner._decode._model = failing
    with pytest.raises(GenerationError, match="no more"):
        llm.generate(PROMPTS, PLAIN[0])
    assert results(llm.generate(PROMPTS, PLAIN[0])) == expected
