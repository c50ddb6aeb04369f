"""Every model against Hugging Face, by `sglite.compare`.

    pytest tests/models/test_generation_models.py
    ONLY_RUN=Qwen/Qwen2-1.5B pytest tests/models/test_generation_models.py

The first runs the small random checkpoint of every native family. `ONLY_RUN` runs one model alone:
a name of a small one, one of `REAL_MODELS` (downloaded from the hub), or a checkpoint's folder.
A name that is none of these is an error. A new model belongs in one of the two lists.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import pytest

import sglite
from tests.checkpoints import CONFIGS, make_checkpoint


@dataclass(frozen=True)
class ModelCase:
    """A model to run.

    Attributes:
        model: a hub id or a folder; a key of `tests.checkpoints.CONFIGS` where `is_small`.
        dtype: what to run it in.
        is_small: whether the checkpoint is made with random weights.
        trust_remote_code: whether its Python code may run.
    """

    model: str
    dtype: str = "auto"
    is_small: bool = False
    trust_remote_code: bool = False


#: Made here, with random weights.
SMALL_MODELS = [ModelCase(name, "float32", is_small=True) for name in CONFIGS]

#: Run only when they are asked for, since they are downloaded.
REAL_MODELS = [
    ModelCase("meta-llama/Llama-3.2-1B"),
    ModelCase("meta-llama/Llama-3.1-8B-Instruct"),
    ModelCase("mistralai/Mistral-7B-v0.1"),
    ModelCase("Qwen/Qwen2-1.5B"),
    ModelCase("Qwen/Qwen2.5-0.5B"),
    ModelCase("Qwen/Qwen3-0.6B"),
    ModelCase("HuggingFaceTB/SmolLM2-135M"),
    ModelCase("TinyLlama/TinyLlama-1.1B-Chat-v1.0"),
]


def chosen_cases(only_run: str | None) -> list[ModelCase]:
    """What to run; raises UsageError for a name that nothing is known by."""
    if not only_run:
        return SMALL_MODELS
    found = [case for case in SMALL_MODELS + REAL_MODELS if case.model == only_run]
    if not found and (Path(only_run) / "config.json").is_file():
        found = [ModelCase(only_run)]
    if not found:
        known = ", ".join(case.model for case in SMALL_MODELS + REAL_MODELS)
        raise pytest.UsageError(
            f"ONLY_RUN={only_run} is no folder with a config.json and in no list of {__name__}: "
            f"{known}"
        )
    return found


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        cases = chosen_cases(os.environ.get("ONLY_RUN"))
        metafunc.parametrize("case", cases, ids=[case.model for case in cases])


def test_generation(case, tmp_path):
    model = make_checkpoint(tmp_path, case.model) if case.is_small else case.model
    report = sglite.compare(
        model,
        dtype=case.dtype,
        trust_remote_code=case.trust_remote_code,
        itself=not case.is_small,  # small ones: tests/test_invariance.py
        new_tokens=32,
    )
    print(report)
    assert report.passed, report.verdict


def test_one_model_can_be_chosen(tmp_path):
    assert [case.model for case in chosen_cases("Qwen/Qwen2-1.5B")] == ["Qwen/Qwen2-1.5B"]
    assert chosen_cases("qwen2")[0].is_small
    make_checkpoint(tmp_path, "llama")
    assert chosen_cases(str(tmp_path)) == [ModelCase(str(tmp_path))]
    assert len(chosen_cases(None)) == len(CONFIGS)
    with pytest.raises(pytest.UsageError, match="ONLY_RUN=nobody/nothing is no folder.*Qwen2-1.5B"):
        chosen_cases("nobody/nothing")
