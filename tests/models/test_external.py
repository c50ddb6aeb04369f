"""Model classes in packages of others, by the environment variable and by entry points."""

import importlib
import sys
import textwrap
import warnings

import pytest

from sglite import LLM, ModelRegistry, UnsupportedModelError
from sglite.models.llama import LlamaForCausalLM
from sglite.models.registry import _ModelRegistry

VARIABLE = "SGLITE_EXTERNAL_MODEL_PACKAGE"
WRAPPER = """
from sglite.models.llama import LlamaForCausalLM

class {name}(LlamaForCausalLM):
    pass

EntryClass = {name}
"""


def wrapper(name):
    return WRAPPER.format(name=name)


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes files into a folder that is on the path; what they define is forgotten afterwards."""
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)

    def write(**files):
        for name, text in files.items():
            path = tmp_path.joinpath(*name.split("__in__")[::-1]).with_suffix(".py")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(textwrap.dedent(text))
        importlib.invalidate_caches()

    yield write
    for name in set(sys.modules) - before:
        if name.startswith("their_"):
            del sys.modules[name]


@pytest.fixture
def package(tmp_path, monkeypatch, write):
    """Writes a package, and names it in the environment; gives its folder."""

    def make(name="their_models", **modules):
        modules = {"__init__": "", **modules}
        for path, text in modules.items():
            write(**{f"{path}__in__{name}": text})
        monkeypatch.setenv(VARIABLE, name)
        return tmp_path / name

    return make


@pytest.fixture
def declare(tmp_path, write):
    """Declares entry points, as an installed package does."""

    def declare(text, name="theirs"):
        folder = tmp_path / f"{name}-1.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (folder / "entry_points.txt").write_text(f"[sglite.models]\n{text}\n")
        importlib.invalidate_caches()

    return declare


def test_a_class_of_the_package(package):
    package(wrapper=wrapper("TheirModel"))
    registry = _ModelRegistry()
    assert "TheirModel" in registry.models
    name, found = registry.resolve(["TheirModel", "LlamaForCausalLM"])
    assert name == "TheirModel"
    assert found is sys.modules["their_models.wrapper"].TheirModel
    assert "TheirModel" in list(registry.models)
    assert len(registry.models) == len(list(registry.models))


def test_a_list_of_classes_in_the_package_itself(package):
    both = wrapper("One") + "\nclass Two(One):\n    pass\n\nEntryClass = [One, Two]\n"
    package(__init__=both)
    registry = _ModelRegistry()
    assert {"One", "Two"} <= set(registry.models)


def test_modules_of_packages_within_it_are_scanned(package, write):
    package()
    write(__init____in__deep__in__their_models="", wrapper__in__deep__in__their_models=wrapper("A"))
    assert "A" in _ModelRegistry().models


def test_a_module_that_stands_alone(write, monkeypatch):
    write(their_module=wrapper("Alone"))
    monkeypatch.setenv(VARIABLE, "their_module")
    assert "Alone" in _ModelRegistry().models


def test_a_main_module_is_not_run(package):
    package(wrapper=wrapper("TheirModel"), __main__="raise SystemExit('was run')")
    registry = _ModelRegistry()
    assert "TheirModel" in registry.models
    assert not registry._external.problems()


def test_it_goes_before_the_library_and_behind_what_is_registered(package):
    package(
        wrapper=wrapper("LlamaForCausalLM")
        .replace("(Llama", "(Base")
        .replace("import LlamaForCausalLM", "import LlamaForCausalLM as BaseForCausalLM")
    )
    registry = _ModelRegistry()
    assert registry.models["LlamaForCausalLM"].__module__ == "their_models.wrapper"
    registry.models["LlamaForCausalLM"] = LlamaForCausalLM
    assert registry.models["LlamaForCausalLM"] is LlamaForCausalLM


def test_a_module_that_registers_by_the_decorator(package, registry_as_before):
    text = wrapper("Decorated").replace(
        "class", 'from sglite import register\n\n@register("D")\nclass'
    )
    package("their_decorated", wrapper=text)
    assert ModelRegistry.models["D"] is ModelRegistry.models["Decorated"]


def test_the_variable_is_read_again_when_it_changes(package, monkeypatch):
    registry = _ModelRegistry()
    assert "TheirModel" not in registry.models
    package(wrapper=wrapper("TheirModel"))
    assert "TheirModel" in registry.models
    monkeypatch.delenv(VARIABLE)
    assert "TheirModel" not in registry.models


@pytest.mark.parametrize(
    "value",
    [
        "their_models",
        "their_models.wrapper",
        "their_models.wrapper:TheirModel",
        "their_models.wrapper:EntryClass",
    ],
)
def test_entry_points(package, declare, monkeypatch, value):
    package(wrapper=wrapper("TheirModel"))
    monkeypatch.delenv(VARIABLE)
    declare(f"theirs = {value}")
    assert "TheirModel" in _ModelRegistry().models


def test_the_variable_goes_before_entry_points(package, declare):
    package("their_installed", wrapper=wrapper("TheirModel"))
    declare("theirs = their_installed")
    package("their_copy", wrapper=wrapper("TheirModel"))
    registry = _ModelRegistry()
    assert registry.models["TheirModel"].__module__ == "their_copy.wrapper"
    assert not registry._external.problems()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "1 / 0",
            r"'their_models\.broken' cannot be imported: ZeroDivisionError: .*broken\.py, line 2",
        ),
        (
            "def f(:\n  pass",
            r"'their_models\.broken' cannot be imported: SyntaxError: .*broken\.py, line 2",
        ),
        ("import not_there_at_all", r"'their_models\.broken' cannot .* 'not_there_at_all'"),
        ("import sys; sys.exit(3)", r"'their_models\.broken' cannot be imported: SystemExit: 3"),
        ("EntryClass = 3", r"'their_models\.broken': EntryClass must be a class .* got 3"),
        (
            "EntryClass = dict",
            r"'their_models\.broken': EntryClass must be a class .*torch\.nn\.Module",
        ),
        (wrapper("TheirModel"), r"EntryClass names a class TheirModel, and so does the module"),
    ],
)
def test_what_is_broken_is_named_and_stops_nothing_else(package, text, message):
    package(broken="\n" + text, sound=wrapper("TheirModel"))
    registry = _ModelRegistry()
    assert registry.find(["TheirModel"]).__name__ == "TheirModel"
    with pytest.warns(UserWarning, match=message) as caught:
        registry.warn_of_broken_packages()
    registry.warn_of_broken_packages()  # not again
    assert len(caught) == 1
    with pytest.raises(UnsupportedModelError, match=message):
        registry.resolve(["Other"])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("not_there_at_all", "entry point theirs = 'not_there_at_all': there is no module"),
        ("their_models.wrapper:Missing", "entry point theirs = .*has no attribute 'Missing'"),
        (
            "their_models.wrapper:make",
            "'their_models.wrapper': entry point theirs .* must be a class",
        ),
    ],
)
def test_broken_entry_points(package, declare, monkeypatch, value, message):
    package(wrapper=wrapper("TheirModel") + "\ndef make():\n    pass\n")
    declare(f"theirs = {value}")
    registry = _ModelRegistry()
    assert "TheirModel" in registry.models
    (problem,) = registry._external.problems()
    with pytest.raises(UnsupportedModelError, match=message):
        registry.resolve(["Other"])
    assert problem.startswith(("entry point", "the module"))


def test_a_package_that_is_not_there(monkeypatch):
    monkeypatch.setenv(VARIABLE, "not_there_at_all")
    registry = _ModelRegistry()
    assert registry.models["LlamaForCausalLM"] is LlamaForCausalLM
    with pytest.raises(UnsupportedModelError, match=f"{VARIABLE}=not_there_at_all: .*PYTHONPATH"):
        registry.resolve(["Other"])


def test_a_mended_module_is_found_by_the_next_llm(package):
    path = package(wrapper="1 / 0") / "wrapper.py"
    registry = _ModelRegistry()
    assert registry.find(["Mended"]) is None
    path.write_text(wrapper("Mended") + "\n" * 9)  # of another size, for Python's cache
    assert registry.find(["Mended"]).__name__ == "Mended"
    assert not registry._external.problems()


def test_other_models_load_with_a_warning(package):
    package("their_other", wrapper="1 / 0")
    with pytest.warns(UserWarning, match=r"'their_other\.wrapper' cannot be imported"):
        LLM("demo", kv_cache_tokens=256).close()


def test_a_broken_package_is_warned_of_once(package):
    package("their_third", wrapper="1 / 0")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            LLM("demo", kv_cache_tokens=256).close()
    assert sum("their_third" in str(warning.message) for warning in caught) == 1
