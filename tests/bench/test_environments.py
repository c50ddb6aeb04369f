import subprocess
import sys

import pytest

from bench import environments
from bench.environments import ENVIRONMENTS, Environment, install, is_installed, python_of
from bench.runner import common_prefix


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("SGLITE_PEERS", str(tmp_path))
    return tmp_path


def test_torch_comes_first_and_is_pinned_in_every_step():
    for environment in ENVIRONMENTS.values():
        packages = [package for step in environment.steps for package in step]
        assert all("==" in package for package in packages if not package.startswith("--"))
        if any(package.startswith("torch") for package in packages):
            assert environment.steps[0] == ("torch==2.13.0",)
            assert all("torch==2.13.0" in step for step in environment.steps)


def test_interpreters(folder):
    assert python_of("sglite") == python_of("transformers") == sys.executable
    with pytest.raises(ValueError, match="python -m bench.environments openvino"):
        python_of("openvino")


def test_what_is_installed_stays_until_the_pins_change(folder, monkeypatch):
    said = []

    def run(command, **options):
        said.append((command[0], command[4:], options.get("env", {}).get("FLAGS")))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(environments.subprocess, "run", run)
    monkeypatch.setattr(environments.venv, "create", lambda path, **_: path.mkdir(exist_ok=True))

    def pinned(version):
        monkeypatch.setitem(
            ENVIRONMENTS,
            "openvino",
            Environment((("a==1",), (f"b=={version}",)), ("c",), {"FLAGS": "x"}),
        )

    pinned(1)
    python = str(folder / "openvino" / "bin" / "python")
    install("openvino")
    assert said == [
        (python, ["--quiet", "a==1"], "x"),
        (python, ["--quiet", "b==1"], "x"),
        (python, ["--quiet", "--yes", "c"], None),
    ]
    assert is_installed("openvino")
    assert python_of("openvino") == python
    install("openvino")
    assert len(said) == 3
    pinned(2)
    install("openvino")
    assert said[4][1] == ["--quiet", "b==2"]


def test_a_missing_compiler_is_named(folder, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(RuntimeError, match="cmake, c\\+\\+ is missing"):
        install("llama_cpp")
    assert not (folder / "llama_cpp").exists()


def test_common_prefix():
    assert common_prefix([[1, 2, 3], [1, 2, 4], [1, 2]]) == 2
    assert common_prefix([[1], [2]]) == 0
    assert common_prefix([[1, 2]]) == common_prefix([[1, 2], [1, 2]]) == 2
