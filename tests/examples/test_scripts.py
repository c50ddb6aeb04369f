"""The example scripts, run as a person runs them."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.checkpoints import DEMO_FOLDER


def run(pytestconfig, name, *arguments):
    done = subprocess.run(
        [sys.executable, str(pytestconfig.rootpath / "examples" / name), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_demo_shows_prompts_answers_and_speed(pytestconfig):
    printed = run(pytestconfig, "demo.py")
    assert "What is 17 + 25?" in printed
    assert "42" in printed
    assert "47" in printed  # the second turn of the chat
    assert "20 21 22 23 24" in printed.replace(",", "")
    assert printed.count("per second") == 2
    for answer in ("There are 4 figures", "The star is red", "The number is 47"):
        assert answer in printed


def test_quickstart(pytestconfig):
    assert "42" in run(pytestconfig, "quickstart.py")


def test_llama_wrapper_runs_both_ways(pytestconfig):
    printed = run(pytestconfig, "llama_wrapper.py")
    assert printed.count("42") >= 2


def test_json_output_is_json_of_the_schema(pytestconfig):
    lines = run(pytestconfig, "json_output.py").splitlines()
    answers = [ast.literal_eval(line.split(" -> ")[1]) for line in lines]
    assert [set(answer) for answer in answers] == [{"country", "capital"}] * 2


README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
README_BLOCKS = [part.split("```")[0] for part in README.split("```python\n")[1:]]


@pytest.mark.parametrize("block", range(len(README_BLOCKS)))
def test_the_readme_says_what_works(pytestconfig, block, tmp_path):
    code = README_BLOCKS[block].replace(
        "Qwen/Qwen3-0.6B", str(DEMO_FOLDER)
    )  # nothing is downloaded in tests
    script = tmp_path / "block.py"
    script.write_text(code)
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=pytestconfig.rootpath,
    )
    assert done.returncode == 0, done.stderr
