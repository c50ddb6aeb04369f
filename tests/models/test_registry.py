"""Finding model classes."""

import subprocess
import sys

import pytest
from torch import nn

import sglite
from sglite import ModelRegistry, UnsupportedModelError, register
from sglite.models.llama import LlamaForCausalLM
from sglite.models.registry import _BUILT_IN


@pytest.fixture(autouse=True)
def _registry_as_before(registry_as_before):
    pass


def test_the_decorator_returns_the_class():
    @register("MyModel")
    class MyModel(nn.Module):
        """A model."""

    assert isinstance(MyModel, type)
    assert ModelRegistry.models["MyModel"] is MyModel
    assert ModelRegistry.resolve(["MyModel"]) == ("MyModel", MyModel)


def test_the_mapping_is_a_mapping():
    class MyModel(nn.Module):
        """A model."""

    models = ModelRegistry.models
    count = len(models)
    models["MyModel"] = MyModel
    assert len(models) == count + 1
    assert "MyModel" in models
    assert list(models).count("MyModel") == 1
    assert dict(models)["MyModel"] is MyModel
    assert models.get("Other") is None
    del models["MyModel"]
    assert "MyModel" not in models
    with pytest.raises(KeyError):
        models["MyModel"]


def test_registering_again_replaces():
    for _ in range(2):  # a notebook cell run twice

        @register("MyModel")
        class MyModel(nn.Module):
            """A model."""

    assert ModelRegistry.models["MyModel"] is MyModel


def test_a_built_in_can_be_replaced():
    @register("LlamaForCausalLM")
    class Mine(LlamaForCausalLM):
        """A model."""

    assert ModelRegistry.models["LlamaForCausalLM"] is Mine


@pytest.mark.parametrize("name", _BUILT_IN)
def test_built_in_families(name):
    assert ModelRegistry.models[name].__name__ == name


def test_built_in_families_are_imported_when_asked_for():
    code = (
        "import sys; from sglite import ModelRegistry; assert 'LlamaForCausalLM' in"
        " ModelRegistry.models; assert 'sglite.models.llama' not in sys.modules;"
        " ModelRegistry.models['LlamaForCausalLM']; assert 'sglite.models.llama' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=sglite.__path__[0] + "/..")


def test_the_first_known_architecture_counts():
    name, _ = ModelRegistry.resolve(["Unknown", "Qwen3ForCausalLM", "LlamaForCausalLM"])
    assert name == "Qwen3ForCausalLM"


def test_an_unknown_architecture_lists_the_known_ones_and_the_nearest():
    with pytest.raises(UnsupportedModelError) as caught:
        ModelRegistry.resolve(["LlamaForCasualLM"])
    message = str(caught.value)
    assert "'LlamaForCasualLM'" in message
    assert "Did you mean 'LlamaForCausalLM'?" in message
    for name in _BUILT_IN:
        assert name in message


@pytest.mark.parametrize("wrong", [42, "LlamaForCausalLM", dict, nn.Linear(1, 1), lambda: None])
def test_only_module_classes_are_registered(wrong):
    with pytest.raises(TypeError, match="'MyModel' must be registered with a class that derives"):
        register("MyModel")(wrong)
    with pytest.raises(TypeError, match=r"derives from torch\.nn\.Module"):
        ModelRegistry.models["MyModel"] = wrong


def test_the_decorator_needs_a_name():
    with pytest.raises(TypeError, match=r"as in @register\('MyModel'\)"):

        @register
        class MyModel(nn.Module):
            """A model."""

    with pytest.raises(TypeError, match="must be a string"):
        ModelRegistry.models[""] = nn.Module
