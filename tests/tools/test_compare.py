"""`sglite.compare`: right models pass, and of wrong ones the first wrong module is named."""

import pytest

import sglite
from tests.checkpoints import CONFIGS, make_checkpoint
from tests.tools.planted import BUGS

#: Epsilon only shows where activations are small; see `tests.checkpoints.make_model`.
PLAIN = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
QUICK = {"itself": False, "new_tokens": 4}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Makes each checkpoint once."""
    made = {}

    def folder(name):
        if name not in made:
            base, overrides = ("llama", PLAIN) if name == "llama-plain" else (name, {})
            made[name] = make_checkpoint(tmp_path_factory.mktemp(name), base, **overrides)
        return made[name]

    return folder


@pytest.mark.parametrize("name", CONFIGS)
def test_right_models_pass(folders, name):
    report = sglite.compare(folders(name), **QUICK)
    assert report.passed, str(report)
    assert report
    assert report.first_divergence is None
    assert [row.path for row in report.layers] == [f"model.layers.{i}" for i in range(3)]
    assert all(0 < row.relative_error < 1e-5 for row in report.layers)
    assert {text.prompt_tokens for text in report.texts} >= {1, 15, 16, 17, 73}


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_a_planted_bug_is_named(folders, bug):
    report = sglite.compare(folders(bug.checkpoint), architecture=bug.architecture, **QUICK)
    assert not report.passed
    first = report.first_divergence
    assert (first.path, first.position) == (bug.path, bug.position), str(report)
    assert str(first).startswith(f"{bug.path}: relative error ")
    assert f"first at position {bug.position}" in str(first)
