"""Outputs: both habits of reading them, and what an unknown key says."""

import dataclasses
import json
import pickle

import pytest

from sglite.interface.errors import RequestError
from sglite.interface.outputs import (
    CompletionOutput,
    Logprob,
    RequestOutput,
    StreamChunk,
    Usage,
)


def completion(index=0, **changes):
    values = {
        "text": " Paris",
        "token_ids": [12, 2],
        "logprobs": [
            {12: Logprob(-0.1, 1, " Paris"), 13: Logprob(-3.0, 2, " Rome")},
            {2: Logprob(-0.5, 3, "")},
        ],
        "finish_reason": "stop",
        "cumulative_logprob": -0.6,
        "seed": 9,
    }
    return CompletionOutput(index=index, **{**values, **changes})


def request(*completions, **changes):
    values = {
        "request_id": "r7",
        "prompt": "The capital of France is",
        "prompt_token_ids": [1, 5, 6],
        "outputs": list(completions) or [completion()],
        "usage": Usage(
            prompt_tokens=3,
            cached_tokens=2,
            completion_tokens=2,
            time_to_first_token=0.01,
            latency=0.05,
            finish_reason="stop",
        ),
        "prompt_logprobs": [None, None, {6: Logprob(-1.0, 4, " is")}],
    }
    return RequestOutput(**{**values, **changes})


def test_the_short_names_are_those_of_the_first_completion():
    first, second = completion(), completion(1, text="x", token_ids=[4], logprobs=None)
    out = request(first, second)
    assert out.text == out.outputs[0].text == " Paris"
    assert out.token_ids == [12, 2]
    assert out.logprobs is first.logprobs
    assert out.finish_reason == "stop"
    assert out.logprobs[0][12].rank == 1
    assert out.logprobs[0][12].decoded_token == " Paris"


def test_sglangs_keys():
    out = request()
    assert out["text"] == " Paris"
    assert out["output_ids"] == [12, 2]
    assert out["meta_info"] == {
        "id": "r7",
        "prompt_tokens": 3,
        "cached_tokens": 2,
        "completion_tokens": 2,
        "e2e_latency": 0.05,
        "time_to_first_token": 0.01,
        "finish_reason": {"type": "stop", "matched": 2},
        "seed": 9,
        "output_token_logprobs": [(-0.1, 12, " Paris"), (-0.5, 2, "")],
        "input_token_logprobs": [(None, 1, None), (None, 5, None), (-1.0, 6, " is")],
    }
    assert "text" in out
    assert "prompt" not in out
    assert json.loads(json.dumps(dict(out)))["output_ids"] == [12, 2]


def test_logprobs_that_nobody_asked_for_are_in_no_dict():
    info = request(completion(logprobs=None), prompt_logprobs=None)["meta_info"]
    assert not {"output_token_logprobs", "input_token_logprobs"} & set(info)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"finish_reason": None}, None),
        ({"finish_reason": "stop"}, {"type": "stop", "matched": 2}),
        ({"finish_reason": "stop", "stop_reason": "\n"}, {"type": "stop", "matched": "\n"}),
        ({"finish_reason": "stop", "stop_reason": 0}, {"type": "stop", "matched": 0}),
        ({"finish_reason": "length"}, {"type": "length", "length": 2}),
        ({"finish_reason": "abort"}, {"type": "abort", "message": ""}),
        (
            {"finish_reason": "error", "error": RequestError("NaN")},
            {"type": "error", "message": "NaN"},
        ),
    ],
)
def test_the_finish_reason_has_sglangs_form(changes, expected):
    assert request(completion(**changes))["meta_info"]["finish_reason"] == expected


@pytest.mark.parametrize("out", [request(), StreamChunk(index=0, text="", token_ids=[])])
class TestKeys:
    def test_an_unknown_key_names_the_known_ones(self, out):
        with pytest.raises(KeyError) as caught:
            out["output_id"]
        message = str(caught.value)
        assert "no key 'output_id'. Did you mean 'output_ids'?" in message
        assert all(key in message for key in dict(out))

    @pytest.mark.parametrize("key", [0, -1, slice(0, 1), None])
    def test_it_is_no_list(self, out, key):
        with pytest.raises(TypeError, match=r"is no list.*a single prompt gives a single"):
            out[key]
        with pytest.raises(TypeError, match="not iterable"):
            list(out)

    def test_nothing_can_be_changed(self, out):
        with pytest.raises(dataclasses.FrozenInstanceError):
            out.index = 3


def test_usage_adds_up_and_holds_times_and_reason():
    usage = request().usage
    assert usage.total_tokens == 5
    assert (usage.time_to_first_token, usage.latency, usage.finish_reason) == (0.01, 0.05, "stop")


def test_finished_and_error_look_at_every_completion():
    error = RequestError("NaN at step 3")
    running = completion(1, finish_reason=None)
    failed = completion(1, finish_reason="error", error=error)
    assert request().finished
    assert not request(completion(), running).finished
    assert request().error is None
    assert request(completion(), failed).error is error


def test_an_output_has_a_completion():
    with pytest.raises(ValueError, match=r"outputs=\[\]"):
        request(outputs=[])


def test_repr_is_short():
    assert repr(request()) == (
        "RequestOutput(text=' Paris', finish_reason='stop', prompt_tokens=3, completion_tokens=2)"
    )
    failed = completion(1, finish_reason="error", error=RequestError("NaN"))
    out = request(completion(text="x" * 10_000), failed)
    assert len(repr(out)) < 250
    assert "2 completions" in repr(out)
    assert "RequestError('NaN')" in repr(out)
    assert repr(completion()) == (
        "CompletionOutput(index=0, text=' Paris', 2 tokens, finish_reason='stop')"
    )
    assert "NaN" in repr(failed)


def test_outputs_can_be_pickled():
    out = request()
    assert pickle.loads(pickle.dumps(out)) == out


def test_a_chunk_is_read_by_name_and_by_key():
    chunk = StreamChunk(index=3, text="ab", token_ids=[5])
    assert (chunk.text, chunk["text"], chunk["output_ids"]) == ("ab", "ab", [5])
    assert (chunk["index"], chunk.completion_index) == (3, 0)
    assert chunk["finish_reason"] is None
    assert not chunk.finished
    assert repr(chunk) == "StreamChunk(index=3, text='ab')"


def test_the_last_chunk_says_why_and_carries_the_whole_output():
    chunk = StreamChunk(index=0, text="", token_ids=[], finish_reason="length", output=request())
    assert chunk.finished
    assert chunk.output.usage.prompt_tokens == 3
    assert repr(chunk) == "StreamChunk(index=0, text='', finish_reason='length')"
