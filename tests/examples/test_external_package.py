"""The external package: found by the environment, and installed by pip in a fresh environment."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import sglite
from tests.checkpoints import DEMO_FOLDER

GENERATE = ["-m", "sglite", "generate", "--set", "temperature=0"]
QUESTION = "What is 17 + 25?"


@pytest.fixture(scope="module")
def package(pytestconfig, tmp_path_factory):
    """A copy, since building leaves files behind."""
    folder = pytestconfig.rootpath / "examples" / "external_package"
    return shutil.copytree(folder, tmp_path_factory.mktemp("package") / "external_package")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """One that asks for the package's class."""
    folder = Path(shutil.copytree(DEMO_FOLDER, tmp_path_factory.mktemp("checkpoint") / "model"))
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = ["LlamaWrapper"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def generate(python, checkpoint, *, cwd, **variables):
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("SGLITE_")
    }
    return subprocess.run(
        [str(python), *GENERATE, "--model", str(checkpoint), QUESTION],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        cwd=cwd,
        env={**environment, **variables},
    )


def root():
    return str(Path(sglite.__file__).parents[1])


def test_by_the_environment(package, checkpoint, tmp_path):
    path = os.pathsep.join([root(), str(package)])
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


def test_a_broken_module_is_named_and_another_model_runs(package, checkpoint, tmp_path):
    broken = Path(shutil.copytree(package / "custom_llm", tmp_path / "custom_llm"))
    (broken / "llama_wrapper.py").write_text("from sglite.models.lama import Nothing\n")
    variables = {
        "PYTHONPATH": os.pathsep.join([root(), str(tmp_path)]),
        "SGLITE_EXTERNAL_MODEL_PACKAGE": "custom_llm",
    }
    done = generate(sys.executable, checkpoint, cwd=tmp_path, **variables)
    assert done.returncode == 1
    assert "the module 'custom_llm.llama_wrapper' cannot be imported" in done.stderr
    assert "sglite.models.lama" in done.stderr
    assert "Traceback" not in done.stderr
    done = generate(sys.executable, "demo", cwd=tmp_path, **variables)
    assert done.returncode == 0
    assert "42" in done.stdout
    assert done.stderr.count("the module 'custom_llm.llama_wrapper' cannot be imported") == 1


def test_installed_by_pip_in_a_fresh_environment(package, checkpoint, tmp_path):
    """What the tests' own environment has is seen from there, so that nothing is downloaded."""
    environment = tmp_path / "environment"
    subprocess.run(
        [sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True, timeout=120
    )
    python = environment / "bin" / "python"
    (site_packages,) = environment.glob("lib/python*/site-packages")
    ours = next(path for path in sys.path if path.endswith("site-packages"))
    (site_packages / "ours.pth").write_text(f"{root()}\n{ours}\n")
    done = generate(python, checkpoint, cwd=tmp_path)
    assert done.returncode == 1
    assert "no model class is registered for the architecture 'LlamaWrapper'" in done.stderr

    install = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run(
        [str(python), *install, "--no-index", str(package)], check=True, timeout=240, cwd=tmp_path
    )
    assert list(site_packages.glob("custom_llm-*.dist-info"))
    done = generate(python, checkpoint, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "42" in done.stdout
    assert done.stderr == ""
