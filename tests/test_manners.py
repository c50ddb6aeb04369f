"""A library changes nothing that others share, and says nothing unasked."""

import json
import logging
import subprocess
import sys
import warnings

import pytest
import torch

from sglite import LLM, GenerationError, register
from sglite.models.llama import LlamaForCausalLM
from tests.checkpoints import make_checkpoint
from tests.children import ROOT, run_in_child
from tests.host_state import (
    change_everything,
    fail_a_step,
    random_state,
    run_sglite,
    run_transformers_alone,
    unexpected,
)
from tests.vision_checkpoints import make_vision_checkpoint

QUESTION = "What is 17 + 25?"


@pytest.fixture(scope="module")
def alone():
    return json.loads(run_in_child(run_transformers_alone))


def test_nothing_is_changed_beyond_what_transformers_changes(alone):
    stages, draws, left = json.loads(run_in_child(run_sglite))
    for stage, state in stages.items():
        changed = {name: state.get(name) for name in unexpected(state, alone)}
        assert changed == {}, stage
    assert [stage for stage in draws if draws[stage] != draws["before"]] == []
    assert left == []


def test_it_is_seen_when_something_is_changed():
    """The comparison itself: each setting is changed once, and is found under its name."""
    seen, settings = json.loads(run_in_child(change_everything))
    assert {name: name in found for name, found in seen.items() if name not in found} == {}
    own = {name for name in settings if not name.startswith("environment: ")}
    assert own <= seen.keys()


@pytest.mark.parametrize("name", ["llava", "llava-next", "llava-onevision", "gemma3", "qwen2-vl"])
def test_loading_draws_no_random_number(tmp_path, name):
    folder = make_vision_checkpoint(tmp_path, name)
    before = random_state()
    LLM(folder, kv_cache_tokens=64).close()
    assert random_state() == before


def test_layers_of_somebodys_own_draw_their_first_values_from_elsewhere(
    tmp_path, registry_as_before
):
    @register("OwnForCausalLM")
    class OwnForCausalLM(LlamaForCausalLM):
        def __init__(self, *arguments, **keywords):
            super().__init__(*arguments, **keywords)
            drawn.append(torch.nn.Linear(4, 4))

    drawn = []
    folder = make_checkpoint(tmp_path)
    before = random_state()
    LLM(folder, architecture="OwnForCausalLM", kv_cache_tokens=64).close()
    assert drawn
    assert random_state() == before


def say_nothing():
    """A child process: two lives of an LLM, with warnings on and a failing step."""
    warnings.simplefilter("always")
    for _ in range(2):
        with LLM("demo", kv_cache_tokens=1024) as llm:
            llm.generate([QUESTION] * 2, temperature=0)
            fail_a_step(llm, GenerationError)
            list(llm.stream(QUESTION, temperature=0))
    left_open = LLM("demo", kv_cache_tokens=1024)
    left_open.generate(QUESTION, temperature=0)
    globals()["for the end of the interpreter"] = left_open


def test_it_is_quiet_by_default():
    code = "from tests.test_manners import say_nothing; say_nothing()"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300
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
