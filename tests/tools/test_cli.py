"""The command line, as a person types it."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.command_line import run


def test_generate():
    """In a process of its own; the others are in this one."""
    words = ["generate", "--model", "demo", "What is 17 + 25?", "--set", "temperature=0"]
    done = subprocess.run(
        [sys.executable, "-m", "sglite", *words], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "42" in done.stdout
    assert done.stderr == ""


def test_generate_reads_prompts_from_standard_input():
    prompts = "What is 17 + 25?\n\nThe capital of France is\n"
    done = run("generate", "--set", "temperature=0", "--llm", "dtype=float32", input=prompts)
    lines = done.stdout.splitlines()
    assert "42" in lines[0]
    assert "Paris" in lines[1]


def test_generate_through_the_chat_template():
    done = run("generate", "--chat", "What is 17 + 25?", "--set", "temperature=0")
    assert "42" in done.stdout


PICTURES = Path(__file__).parents[2] / "examples" / "pictures"


def look(*arguments):
    return run("generate", "--model", "demo-vl", "--set", "temperature=0", *arguments)


def test_generate_with_a_picture():
    number = str(PICTURES / "number.png")
    done = look("--image", number, "What number is this?", "What colour is <image>?")
    assert done.returncode == 0, done.stderr
    assert "47" in done.stdout.splitlines()[0]
    assert "blue" in done.stdout.splitlines()[1]
    done = look("--chat", "--image", number, "What number is in <image>?")
    assert "47" in done.stdout


def test_pictures_and_their_places_must_be_as_many():
    number = str(PICTURES / "number.png")
    for arguments in ([], ["--chat"]):
        done = look(*arguments, "--image", number, "--image", number, "Read <image>.")
        assert done.returncode == 1
        assert done.stderr.startswith("sglite: ")
        assert "Traceback" not in done.stderr


def test_an_unknown_argument_is_refused():
    done = run("generate", "Hi", "--taks")  # only eval hands on what it does not know
    assert done.returncode == 2
    assert "unrecognized arguments: --taks" in done.stderr


def test_chat_holds_a_conversation():
    done = run("chat", "--set", "temperature=0", input="What is 30 + 12?\nPlus 5?\n\n")
    assert done.returncode == 0, done.stderr
    assert "42" in done.stdout
    assert "47" in done.stdout


def test_config_tells_what_a_bug_report_needs():
    done = run("config")
    for name in ("sglite", "torch", "transformers", "CPU path", "CUDA in the extension"):
        assert name in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "/nowhere/at/all"], "/nowhere/at/all"),
        (["--set", "temprature=1"], "temperature"),
        (["--llm", "gpu_memory_utilization=0.5"], "mem_fraction"),
        (["--set", "temperature"], "NAME=VALUE"),
    ],
)
def test_errors_are_one_line_and_status_1(arguments, message):
    done = run("generate", "Hi", *arguments)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
