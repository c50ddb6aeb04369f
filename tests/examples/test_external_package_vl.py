"""The package with a vision-language model: by the three variables, and installed by pip."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.checkpoints import DEMO_FOLDER
from tests.packages import ROOT, copy_checkpoint, copy_package, run

PICTURE = Path(__file__).parents[2] / "examples" / "pictures" / "number.png"
CHECKPOINT = DEMO_FOLDER.with_name("demo-vl")
QUESTION = "What number is this?"
VARIABLES = {
    "SGLITE_EXTERNAL_MODEL_PACKAGE": "custom_vl",
    "SGLITE_EXTERNAL_MM_MODEL_ARCH": "CustomQwen2VL",
    "SGLITE_EXTERNAL_MM_PROCESSOR_PACKAGE": "custom_vl",
}
# Captures the logits of the first token, with the package's class and with the library's; then asks
# on the command line.
COMPARE = """
import sys
import torch
from sglite import LLM
from sglite.tools.cli import main

folder, picture, question = sys.argv[1:]
captured = []
for architecture in ("CustomQwen2VL", "Qwen2VLForConditionalGeneration"):
    with LLM(folder, architecture=architecture, dtype="float32", kv_cache_tokens=1024) as llm:
        keep = lambda token_ids, logits: captured.append(logits.clone()) or logits
        llm.generate({"text": "<image>What is this?", "images": [picture]},
                     temperature=0, max_new_tokens=1, logits_processors=keep)
ours, plain = captured
assert (plain > 1).any() and (plain < 0).any()
expected = torch.where(plain > 0, plain.abs().sqrt(), plain)
torch.testing.assert_close(ours, expected)
options = ["--set", "temperature=0", "--model", folder, "--image", picture]
sys.exit(main(["generate", *options, question]))
"""


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    return copy_package("external_package_vl", tmp_path_factory.mktemp("package"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return copy_checkpoint(CHECKPOINT, tmp_path_factory.mktemp("checkpoint"), "CustomQwen2VL")


def generate(python, checkpoint, *, cwd, **variables):
    arguments = ["--set", "temperature=0", "--model", checkpoint, "--image", PICTURE]
    return run(python, "-m", "sglite", "generate", *arguments, QUESTION, cwd=cwd, **variables)


def test_by_the_environment(package, checkpoint, tmp_path):
    """Its logits are the square roots, and its answers on the command line are right."""
    path = os.pathsep.join([ROOT, str(package)])
    done = run(
        *(sys.executable, "-c", COMPARE, checkpoint, PICTURE, QUESTION),
        cwd=tmp_path,
        PYTHONPATH=path,
        **VARIABLES,
    )
    assert done.returncode == 0, done.stderr
    assert "47" in done.stdout
    assert done.stderr == ""


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
    assert list(site_packages.glob("custom_vl-*.dist-info"))
    done = generate(python, checkpoint, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "47" in done.stdout
    assert done.stderr == ""
