"""`bench/one_batch.py`, as a person runs it."""

import re
import subprocess
import sys
from pathlib import Path

from tests.checkpoints import edit_json, make_checkpoint

SCRIPT = Path(__file__).parents[2] / "bench" / "one_batch.py"


def run(*arguments):
    return subprocess.run(
        [sys.executable, SCRIPT, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_a_right_model_passes(tmp_path):
    done = run("--correct", "--model", make_checkpoint(tmp_path, "qwen3"), "--output-len", 4)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "passed"
    rows = re.findall(r"prefill logits, (\w+) +\[(.*)\]", done.stdout)
    assert len(rows) == 6
    for (_, ours), (_, theirs) in zip(rows[::2], rows[1::2], strict=True):
        pairs = zip(ours.split(","), theirs.split(","), strict=True)
        assert all(abs(float(a) - float(b)) < 1e-4 for a, b in pairs)


def test_a_wrong_model_fails(tmp_path):
    folder = make_checkpoint(tmp_path, "mistral")
    # Read by sglite alone, since Hugging Face's Llama knows no window.
    edit_json(folder / "config.json", {"model_type": "llama", "sliding_window": 2})
    done = run("--correct", "--model", folder, "--architecture", "MistralForCausalLM")
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1].startswith("failed: prefill: relative error")


def test_a_batch_is_measured(tmp_path):
    folder = make_checkpoint(tmp_path)
    done = run("--model", folder, "--batch-size", 3, "--input-len", 20, "--output-len", 5)
    assert done.returncode == 0, done.stderr
    values = re.findall(r"(prefill|decode step|throughput) +([\d.]+)", done.stdout)
    assert [name for name, _ in values] == ["prefill", "decode step", "throughput"]
    assert all(float(value) > 0 for _, value in values)
