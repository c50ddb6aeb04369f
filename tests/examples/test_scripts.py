"""The example scripts and the README's blocks: one as a person runs it, the others in here."""

import ast
import gc
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from tests.checkpoints import DEMO_FOLDER

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def printed_by(capsys, registry_as_before):
    """A function that runs a script and gives what it prints."""

    def run(path):
        runpy.run_path(str(path), run_name="__main__")
        gc.collect()  # an LLM that it has left open
        return capsys.readouterr().out

    return run


def test_demo_shows_prompts_answers_and_speed():
    done = subprocess.run(
        [sys.executable, EXAMPLES / "demo.py"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    printed = done.stdout
    assert "What is 17 + 25?" in printed
    assert "42" in printed
    assert "47" in printed  # the second turn of the chat
    assert "20 21 22 23 24" in printed.replace(",", "")
    assert printed.count("per second") == 2
    for answer in ("There are 4 figures", "The star is red", "The number is 47"):
        assert answer in printed


def test_quickstart(printed_by):
    assert "42" in printed_by(EXAMPLES / "quickstart.py")


def test_llama_wrapper_runs_both_ways(printed_by):
    printed = printed_by(EXAMPLES / "llama_wrapper.py")
    assert printed.count("42") >= 2


def test_json_output_is_json_of_the_schema(printed_by):
    lines = printed_by(EXAMPLES / "json_output.py").splitlines()
    answers = [ast.literal_eval(line.split(" -> ")[1]) for line in lines]
    assert [set(answer) for answer in answers] == [{"country", "capital"}] * 2


README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
README_BLOCKS = [part.split("```")[0] for part in README.split("```python\n")[1:]]


@pytest.mark.parametrize("block", range(len(README_BLOCKS)))
def test_the_readme_says_what_works(pytestconfig, printed_by, block, tmp_path, monkeypatch):
    code = README_BLOCKS[block].replace(
        "Qwen/Qwen3-0.6B", str(DEMO_FOLDER)
    )  # nothing is downloaded in tests
    script = tmp_path / "block.py"
    script.write_text(code)
    monkeypatch.chdir(pytestconfig.rootpath)
    printed_by(script)
