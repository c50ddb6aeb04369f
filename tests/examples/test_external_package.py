"""The external package: found by the environment, and installed by pip in a fresh environment."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import command_line
from tests.checkpoints import DEMO_FOLDER
from tests.packages import ROOT, copy_checkpoint, copy_package, run

GENERATE = ["-m", "sglite", "generate", "--set", "temperature=0"]
QUESTION = "What is 17 + 25?"


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    return copy_package("external_package", tmp_path_factory.mktemp("package"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return copy_checkpoint(DEMO_FOLDER, tmp_path_factory.mktemp("checkpoint"), "LlamaWrapper")


def generate(python, checkpoint, *, cwd, **variables):
    return run(python, *GENERATE, "--model", checkpoint, QUESTION, cwd=cwd, **variables)


def test_by_the_environment(package, checkpoint, tmp_path):
    path = os.pathsep.join([ROOT, str(package)])
    done = generate(
        sys.executable,
        checkpoint,
        cwd=tmp_path,
        PYTHONPATH=path,
        SGLITE_EXTERNAL_MODEL_PACKAGE="custom_llm",
    )
    assert done.returncode == 0, done.stderr
    assert "42" in done.stdout
    assert done.stderr == ""


def test_a_broken_module_is_named(package, checkpoint, tmp_path, monkeypatch):
    """And other models run: tests/models/test_external.py."""
    broken = Path(shutil.copytree(package / "custom_llm", tmp_path / "custom_llm"))
    (broken / "llama_wrapper.py").write_text("from sglite.models.lama import Nothing\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("SGLITE_EXTERNAL_MODEL_PACKAGE", "custom_llm")
    done = command_line.run("generate", "--model", checkpoint, QUESTION)
    del sys.modules["custom_llm"]
    assert done.returncode == 1
    assert "the module 'custom_llm.llama_wrapper' cannot be imported" in done.stderr
    assert "sglite.models.lama" in done.stderr
    assert "Traceback" not in done.stderr


def test_installed_by_pip_in_a_fresh_environment(package, checkpoint, tmp_path):
    """What the tests' own environment has is seen from there, so that nothing is downloaded."""
    environment = tmp_path / "environment"
    subprocess.run(
        [sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True, timeout=300
    )
    python = environment / "bin" / "python"
    (site_packages,) = environment.glob("lib/python*/site-packages")
    ours = next(path for path in sys.path if path.endswith("site-packages"))
    (site_packages / "ours.pth").write_text(f"{ROOT}\n{ours}\n")
    install = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run(
        [str(python), *install, "--no-index", str(package)], check=True, timeout=300, cwd=tmp_path
    )
    assert list(site_packages.glob("custom_llm-*.dist-info"))
    done = generate(python, checkpoint, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "42" in done.stdout
    assert done.stderr == ""
