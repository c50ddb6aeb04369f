"""How often a step goes from Python into the extension, which costs it microseconds each time."""

from collections import Counter

import pytest

from sglite import _C, LLM
from tests.checkpoints import make_checkpoint

NUM_LAYERS = 30
#: Of a decode step: five for each layer, and some around them.
MOST_CALLS = 160
PROMPTS = [[2 + i, 3, 5] for i in range(4)]


@pytest.fixture
def calls(monkeypatch):
    """Counts calls of the extension's functions, by name."""
    counts = Counter()

    def counting(name, function):
        def call(*arguments):
            counts[name] += 1
            return function(*arguments)

        return call

    for name in dir(_C):
        function = getattr(_C, name)
        if type(function).__name__ == "builtin_function_or_method":
            monkeypatch.setattr(_C, name, counting(name, function))
    return counts


def calls_of_a_step(folder, calls, **params):
    """Calls that one further token takes, on average."""
    with LLM(folder, kv_cache_tokens=512) as llm:
        totals = []
        for new_tokens in (4, 12):
            calls.clear()
            llm.generate(PROMPTS, max_new_tokens=new_tokens, ignore_eos=True, **params)
            totals.append(calls.total())
    return (totals[1] - totals[0]) / 8


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_plain_layers_are_one_call(tmp_path, calls, name):
    folder = make_checkpoint(tmp_path, name, num_hidden_layers=NUM_LAYERS)
    assert calls_of_a_step(folder, calls, temperature=0) < 12
    assert calls["decoder_layers"], "nothing is counted"


@pytest.mark.parametrize("params", [{"repetition_penalty": 1.2}, {"logit_bias": {7: 1.0}}])
def test_penalties_and_bias_cost_few(tmp_path, calls, params):
    folder = make_checkpoint(tmp_path, num_hidden_layers=NUM_LAYERS)
    assert calls_of_a_step(folder, calls, **params) < MOST_CALLS


@pytest.mark.parametrize("params", [{}, {"repetition_penalty": 1.2}])
def test_layers_are_taken_apart_in_no_further_step(tmp_path, monkeypatch, params):
    folder = make_checkpoint(tmp_path)
    make, made = _C.LayerViews, []
    monkeypatch.setattr(_C, "LayerViews", lambda *args: made.append(1) or make(*args))
    counts = []
    with LLM(folder, kv_cache_tokens=512) as llm:
        llm.generate(PROMPTS, max_new_tokens=4, **params)  # and the rotary table has grown
        for new_tokens in (4, 12):
            made.clear()
            llm.generate(PROMPTS, max_new_tokens=new_tokens, ignore_eos=True, **params)
            counts.append(len(made))
    assert 1 <= counts[0] == counts[1] <= 2
