"""Which processor serves which model."""

import subprocess
import sys

import pytest
from torch import nn

from sglite import UnsupportedModelError, register
from sglite.models.llama import LlamaForCausalLM
from sglite.models.qwen2_vl import Qwen2VLForConditionalGeneration
from sglite.models.registry import ModelRegistry
from sglite.models.transformers import TransformersVisionModel
from sglite.multimodal import registry
from sglite.multimodal.base_processor import BaseMultimodalProcessor
from sglite.multimodal.hugging_face import HuggingFaceProcessor
from sglite.multimodal.qwen_vl import QwenVLImageProcessor
from sglite.multimodal.registry import find_processor


@pytest.fixture(autouse=True)
def _clean(monkeypatch):
    """What a test registers is forgotten behind it."""
    # The library's own register once, when they are first asked for: not within a test.
    find_processor(Qwen2VLForConditionalGeneration, "Qwen2VLForConditionalGeneration")
    monkeypatch.setattr(registry, "_classes", list(registry._classes))
    monkeypatch.setattr(registry, "_by_name", dict(registry._by_name))
    before = dict(ModelRegistry.models._classes)
    yield
    ModelRegistry.models._classes = before


class Seeing(nn.Module):
    """A model that takes images."""

    def get_image_feature(self, items):
        raise NotImplementedError


def test_of_the_library():
    name = "Qwen2VLForConditionalGeneration"
    assert find_processor(Qwen2VLForConditionalGeneration, name) is QwenVLImageProcessor
    assert find_processor(LlamaForCausalLM, "LlamaForCausalLM") is None


def test_a_subclass_has_that_of_its_base():
    class Derived(Qwen2VLForConditionalGeneration):
        pass

    assert find_processor(Derived, "Derived") is QwenVLImageProcessor

    class Own(QwenVLImageProcessor):
        models = [Derived]  # noqa: RUF012

    assert find_processor(Derived, "Derived") is Own
    name = "Qwen2VLForConditionalGeneration"
    assert find_processor(Qwen2VLForConditionalGeneration, name) is QwenVLImageProcessor

    class Further(Own):  # has no `models` of its own
        pass

    assert find_processor(Derived, "Derived") is Own


def test_given_with_the_model():
    class Processor(BaseMultimodalProcessor):
        pass

    @register("SeeingModel", processor=Processor)
    class Model(Seeing):
        pass

    assert find_processor(Model, "SeeingModel") is Processor
    assert ModelRegistry.models["SeeingModel"] is Model

    @register("SeeingModel")
    class Again(Seeing):
        pass

    with pytest.raises(UnsupportedModelError, match="SeeingModel takes images"):
        find_processor(Again, "SeeingModel")


def test_the_last_one_goes_first():
    class First(BaseMultimodalProcessor):
        models = ("Seeing",)

    assert find_processor(Seeing, "Any") is First

    class Second(BaseMultimodalProcessor):
        models = (Seeing,)

    assert find_processor(Seeing, "Any") is Second


def test_the_callers_own_goes_before_the_librarys_which_comes_later():
    code = """
from sglite.models.qwen2_vl import Qwen2VLForConditionalGeneration
from sglite.multimodal import BaseMultimodalProcessor
from sglite.multimodal.registry import find_processor

class Mine(BaseMultimodalProcessor):
    models = ["Qwen2VLForConditionalGeneration"]

name = "Qwen2VLForConditionalGeneration"
print(find_processor(Qwen2VLForConditionalGeneration, name).__name__)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "Mine"


def test_a_package_that_the_environment_names(tmp_path, monkeypatch):
    package = tmp_path / "my_processors"
    (package / "inner").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "inner" / "__init__.py").touch()
    (package / "inner" / "seeing.py").write_text(
        "from sglite.multimodal import BaseMultimodalProcessor\n"
        "class Mine(BaseMultimodalProcessor):\n"
        "    models = ['Seeing']\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("SGLITE_EXTERNAL_MM_PROCESSOR_PACKAGE", "my_processors")
    monkeypatch.setenv("SGLITE_EXTERNAL_MM_MODEL_ARCH", "Seeing")
    assert find_processor(Seeing, "Seeing").__name__ == "Mine"
    for name in [name for name in sys.modules if name.startswith("my_processors")]:
        del sys.modules[name]


def test_what_is_missing_or_broken_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("SGLITE_EXTERNAL_MM_MODEL_ARCH", "Blind")
    with pytest.raises(UnsupportedModelError, match=r"MODEL_ARCH says that Blind takes images"):
        find_processor(nn.Linear, "Blind")
    monkeypatch.setenv("SGLITE_EXTERNAL_MM_PROCESSOR_PACKAGE", "no_such_package")
    with pytest.raises(UnsupportedModelError, match="PACKAGE=no_such_package.*ModuleNotFound"):
        find_processor(nn.Linear, "Blind")


@pytest.mark.parametrize("is_reversed", [False, True])
def test_a_model_run_by_hugging_faces_class_has_its_processor(is_reversed):
    """Whatever was imported first."""
    if is_reversed:
        registry._classes.reverse()
    name = "Qwen2VLForConditionalGeneration"
    assert find_processor(TransformersVisionModel, name) is HuggingFaceProcessor
    assert find_processor(Qwen2VLForConditionalGeneration, name) is QwenVLImageProcessor

    class Own(BaseMultimodalProcessor):
        models = (name,)

    registry._classes.insert(0, registry._classes.pop())
    assert find_processor(TransformersVisionModel, name) is Own
