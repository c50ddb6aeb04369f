"""The example of a model file: StableLM against Hugging Face."""

import importlib.util

import pytest

from sglite import LLM, UnsupportedModelError, compare
from sglite.models.registry import _BUILT_IN
from tests.models.unregistered import make_config, make_model, save


@pytest.fixture(autouse=True)
def example(pytestconfig, registry_as_before):
    path = pytestconfig.rootpath / "examples" / "stablelm.py"
    spec = importlib.util.spec_from_file_location("stablelm", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_is_one_that_the_library_has_no_file_for():
    assert "StableLmForCausalLM" not in _BUILT_IN


def test_it_is_about_60_lines(pytestconfig):
    text = (pytestconfig.rootpath / "examples" / "stablelm.py").read_text()
    assert text.count("\n") <= 70


@pytest.mark.parametrize("use_qkv_bias", [True, False])
def test_compare_passes(tmp_path, use_qkv_bias):
    folder = save(make_model(make_config("StableLmConfig", use_qkv_bias=use_qkv_bias)), tmp_path)
    report = compare(folder, new_tokens=8, itself=use_qkv_bias)
    assert report, str(report)
    assert len(report.layers) == 2
    assert "StableLmForCausalLM" in report.model


@pytest.mark.parametrize("name", ["use_parallel_residual", "qk_layernorm"])
def test_what_is_not_implemented_is_refused_by_name(tmp_path, name):
    folder = save(make_model(make_config("StableLmConfig", **{name: True})), tmp_path)
    with pytest.raises(UnsupportedModelError, match=name):
        LLM(folder, kv_cache_tokens=512)
