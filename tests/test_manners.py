"""A library changes nothing that others share, and says nothing unasked."""

import json
import logging
import subprocess
import sys
import warnings

import pytest

from sglite import LLM, GenerationError
from tests.children import ROOT, run_in_child
from tests.host_state import run_sglite, run_transformers_alone

QUESTION = "What is 17 + 25?"


@pytest.fixture(scope="module")
def alone():
    return json.loads(run_in_child(run_transformers_alone))


def test_nothing_is_changed_beyond_what_transformers_changes(alone):
    stages, draws, left = json.loads(run_in_child(run_sglite))
    for stage, state in stages.items():
        for name in state.keys() | alone[0].keys():
            allowed = [other.get(name) for other in alone]
            assert state.get(name) in allowed, f"{stage}: {name} is {state.get(name)}"
    assert [stage for stage in draws if draws[stage] != draws["before"]] == []
    assert left == []


def test_it_is_seen_when_something_is_changed(alone):
    """The comparison itself: it must know the settings, each by a name of its own."""
    for name in ("dtype", "threads", "signals", "start method", "environment: PATH"):
        assert name in alone[0]


def say_nothing():
    """A child process: two lives of an LLM, with warnings on and a failing step."""
    warnings.simplefilter("always")
    for _ in range(2):
        with LLM("demo", kv_cache_tokens=1024) as llm:
            llm.generate([QUESTION] * 2, temperature=0)
            forward = llm.model.forward
            llm.model.forward = None
            try:
                llm.generate(QUESTION)
            except GenerationError:
                llm.model.forward = forward
            list(llm.stream(QUESTION, temperature=0))
    left_open = LLM("demo", kv_cache_tokens=1024)
    left_open.generate(QUESTION, temperature=0)
    globals()["for the end of the interpreter"] = left_open


def test_it_is_quiet_by_default():
    code = "from tests.test_manners import say_nothing; say_nothing()"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_logging_is_pythons_own(caplog):
    with caplog.at_level(logging.INFO, logger="sglite"), LLM("demo", kv_cache_tokens=512) as llm:
        forward = llm.model.forward

        def failing(*arguments):
            raise RuntimeError("planted")

        llm.model.forward = failing
        with pytest.raises(GenerationError):
            llm.generate(QUESTION)
        llm.model.forward = forward
    loaded, failed = caplog.records
    assert loaded.name.startswith("sglite")
    assert "LLM('demo'" in loaded.getMessage()
    assert failed.levelno == logging.WARNING
    assert "planted" in str(failed.exc_info[1])
