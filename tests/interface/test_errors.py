"""The errors: their places among Python's, and the words of those that are put together here."""

import copy
import pickle

import pytest

from sglite.interface import errors
from sglite.interface.errors import GenerationError, RequestError, SGLiteError, suggest
from sglite.interface.outputs import CompletionOutput, RequestOutput, Usage


def output(error=None):
    reason = "stop" if error is None else "error"
    completion = CompletionOutput(
        index=0, text="", token_ids=[1], finish_reason=reason, error=error
    )
    return RequestOutput(
        request_id="0",
        prompt="p",
        prompt_token_ids=[1],
        outputs=[completion],
        usage=Usage(prompt_tokens=1, cached_tokens=0, completion_tokens=1),
    )


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("ConfigError", ValueError),
        ("InvalidRequestError", ValueError),
        ("OutOfMemoryError", MemoryError),
        ("CheckpointError", SGLiteError),
        ("UnsupportedModelError", errors.CheckpointError),
        ("RequestError", SGLiteError),
        ("EngineClosedError", SGLiteError),
        ("GenerationError", SGLiteError),
    ],
)
def test_every_error_is_one_of_ours_and_of_pythons_where_it_fits(name, base):
    error = getattr(errors, name)
    assert issubclass(error, SGLiteError)
    assert issubclass(error, base)
    assert error.__doc__


def test_generation_error_lists_which_prompts_failed_and_why():
    first = RequestError("logits hold NaN at step 3")
    outputs = [output(), output(first), output(), output(KeyError("x"))]
    error = GenerationError(outputs)
    assert error.outputs == outputs
    assert error.__cause__ is first
    lines = str(error).splitlines()
    assert lines[0].startswith("2 of 4 prompts failed")
    assert ".outputs" in lines[0]
    assert lines[1:] == [
        "  prompt 1: logits hold NaN at step 3",
        "  prompt 3: KeyError: 'x'",
    ]


def test_generation_error_shows_five_failures_and_counts_the_rest():
    error = GenerationError([output(RequestError(f"reason {i}")) for i in range(12)])
    lines = str(error).splitlines()
    assert [line for line in lines if "reason" in line] == [
        f"  prompt {i}: reason {i}" for i in range(5)
    ]
    assert lines[-1] == "  and 7 more"


def test_generation_error_keeps_its_cause_when_raised():
    cause = RequestError("why")
    with pytest.raises(GenerationError) as caught:
        raise GenerationError([output(cause)])
    assert caught.value.__cause__ is cause


def test_generation_error_without_a_failure_is_a_mistake():
    with pytest.raises(ValueError, match="at least one output with an error"):
        GenerationError([output()])


@pytest.mark.parametrize("duplicate", [copy.copy, lambda e: pickle.loads(pickle.dumps(e))])
def test_generation_error_can_be_copied_and_pickled(duplicate):
    error = duplicate(GenerationError([output(), output(RequestError("why"))]))
    assert "prompt 1: why" in str(error)
    assert len(error.outputs) == 2
    assert isinstance(error.__cause__, RequestError)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("tempreature", " Did you mean 'temperature'?"),
        ("TOP_P", " Did you mean 'top_p'?"),
        ("zzz", ""),
        ("", ""),
    ],
)
def test_suggest_names_the_nearest_or_nothing(name, expected):
    assert suggest(name, iter(["temperature", "top_k", "top_p"])) == expected
