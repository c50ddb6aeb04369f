"""Steps launched ahead, and decode steps as graphs: the same tokens as step by step.

On the CPU the graph is a stand-in that does the work when it is replayed.
"""

import warnings

import numpy as np
import pytest
import torch

from sglite import LLM, SamplingParams, ops
from sglite.cache.kv_pool import KVPool, LayerSpec
from sglite.engine.decode_graphs import DecodeGraphs
from sglite.engine.decode_state import DecodeState
from sglite.engine.request import Request
from sglite.engine.sampling_state import SamplingState
from sglite.engine.scheduler import ScheduledRequest

PROMPTS = [
    "What is 12 plus 7?",
    "What is the capital of France?",
    "What is the capital of Italy?",
    "12 plus",
    "The capital of Norway",
    "What is 3 plus 4? What is 30 plus 40? What is 31 plus 41?",
    "a",
]


class LateGraph:
    """Does the recorded work at every replay; counts them."""

    num_captures = 0
    num_replays = 0

    def __init__(self, function):
        self._function = function
        self.result = None
        LateGraph.num_captures += 1

    def replay(self):
        self.result = self._function()
        LateGraph.num_replays += 1


@pytest.fixture(autouse=True)
def counts():
    LateGraph.num_captures = LateGraph.num_replays = 0


def make_llm(capture=LateGraph, **options):
    """An LLM that launches ahead and runs decode steps through `capture`, as on a GPU."""
    llm = LLM("demo", device="cpu", seed=3, **options)
    runner = llm._open.engine.runner
    runner.runs_ahead = True
    runner._decode = DecodeGraphs(
        runner.model,
        runner.pool,
        runner.sampler,
        ops.SpareMemory(),
        vocab_size=llm._open.intake.limits.vocab_size,
        max_requests=llm.config.max_running_requests,
        max_tokens=llm.config.context_length,
        capture=capture,
    )
    return llm


def params(index):
    """Of every kind: greedy, drawn, with penalties, with bans, of different lengths."""
    kinds = [
        {"temperature": 0, "max_new_tokens": 20, "ignore_eos": True},
        {"temperature": 1.5, "seed": 5, "max_new_tokens": 30, "ignore_eos": True},
        {"temperature": 0, "repetition_penalty": 1.3, "max_new_tokens": 12, "ignore_eos": True},
        {"temperature": 0, "logit_bias": {7: 3.0}, "max_new_tokens": 3, "logprobs": 2},
        {"temperature": 0.9, "seed": 6, "top_k": 5, "max_new_tokens": 17, "logprobs": 0},
        {"temperature": 0, "max_new_tokens": 1},
    ]
    return kinds[index % len(kinds)]


def results(outputs):
    return [(out.token_ids, out.finish_reason, out.logprobs) for out in outputs]


@pytest.mark.parametrize("options", [{}, {"kv_cache_tokens": 96}, {"max_running_requests": 3}])
def test_the_same_tokens_as_step_by_step(options):
    chosen = [params(index) for index in range(len(PROMPTS))]
    expected = results(LLM("demo", device="cpu", seed=3, **options).generate(PROMPTS, chosen))
    llm = make_llm(**options)
    for _ in range(2):  # the second time out of the prefix cache
        assert results(llm.generate(PROMPTS, chosen)) == expected
    assert LateGraph.num_replays > LateGraph.num_captures > 1
    if "kv_cache_tokens" in options:
        assert llm.stats()["preemptions"] > 0
    llm._open.engine.scheduler.cache.check_invariant()


def test_rows_without_a_request_write_to_the_reserved_page():
    pool = KVPool(8, 4, [LayerSpec(1, 8)], torch.float32)
    state = DecodeState(4, 4, pool)
    requests = [Request([5] * 6, SamplingParams(max_new_tokens=9).resolve()) for _ in range(3)]
    sampling = [SamplingState(request, 50) for request in requests]
    for page, request in enumerate(requests):
        request.hold(np.array([2 * page + 1, 2 * page + 2], np.int32))
    items = [ScheduledRequest(request, 5, 6, True, 0) for request in requests]
    for count in (3, 1):
        state.set(items[:count], sampling[:count], None, [-1] * count)
        rows = state.rows(4, pool.layers, ops.SpareMemory())
        state.advance(rows)
        input_ids, positions, batch = rows.inputs
        assert batch.slots.tolist() == [4 * (2 * page + 2) + 1 for page in range(count)] + [0] * (
            4 - count
        )
        assert batch.kv_lens.tolist() == [6] * count + [0] * (4 - count)
        assert positions[:count].tolist() == [5] * count
        assert input_ids[:count].tolist() == [5] * count


def test_stop_strings_and_processors_in_one_batch():
    def forbid(token_ids, logits):
        logits[token_ids] = -torch.inf
        return logits

    chosen = [
        {"temperature": 0, "logits_processors": [forbid], "max_new_tokens": 10},
        {"temperature": 0, "stop": ["a"], "max_new_tokens": 30},
        {"temperature": 0, "max_new_tokens": 30, "ignore_eos": True},
    ]
    expected = results(LLM("demo", device="cpu").generate(PROMPTS[:3], chosen))
    assert results(make_llm().generate(PROMPTS[:3], chosen)) == expected


def test_a_model_opts_out():
    llm = make_llm()
    type(llm._open.engine.runner.model).cuda_graphs = False
    try:
        opted_out = make_llm()
        assert opted_out.generate(PROMPTS[0], temperature=0).text
        assert LateGraph.num_captures == 0
    finally:
        del type(llm._open.engine.runner.model).cuda_graphs


def expect_warning(llm, match):
    """Generates twice, with one warning in all, and the right tokens."""
    expected = LLM("demo", device="cpu").generate(PROMPTS, temperature=0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            outputs = llm.generate(PROMPTS, temperature=0)
            assert results(outputs) == results(expected)
    assert len(caught) == 1, [str(warning.message) for warning in caught]
    assert match in str(caught[0].message)


def test_one_warning_where_capture_fails():
    def capture(function):
        raise RuntimeError("operation not permitted when stream is capturing")

    expect_warning(make_llm(capture), "LlamaForCausalLM runs without CUDA graphs")


def test_one_warning_where_a_replay_differs():
    class Wrong(LateGraph):
        def replay(self):
            super().replay()
            self.result = self.result.roll(1, dims=1)

    expect_warning(make_llm(Wrong), "replay differs")
