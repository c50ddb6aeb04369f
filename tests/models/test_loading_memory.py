"""What loading adds to a process's memory at most."""

import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.checkpoints import make_checkpoint
from tests.models.loading import move_data_to_odd_places

pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")


def added(folder, **arguments):
    """Bytes that loading adds at most."""
    code = f"""
import re
from sglite.models.checkpoint import resolve_checkpoint
from sglite.models.loader import load_model
import transformers.models.llama.configuration_llama
def memory(kind):
    return int(re.search(kind + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
checkpoint = resolve_checkpoint({str(folder)!r})
open("/proc/self/clear_refs", "w").write("5")
before = memory("VmRSS")
loaded = load_model(checkpoint, **{arguments!r})
print(memory("VmHWM") - before)
"""
    return int(
        subprocess.run(
            [sys.executable, "-c", code], check=True, capture_output=True, text=True
        ).stdout
    )


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    return make_checkpoint(
        tmp_path_factory.mktemp("large"),
        hidden_size=512,
        intermediate_size=4096,
        num_hidden_layers=6,
        num_attention_heads=8,
    )


@pytest.mark.parametrize(("quantization", "share"), [(None, 1.0), ("int8", 0.26)])
@pytest.mark.parametrize("is_odd", [False, True])
def test_is_that_of_the_checkpoint_and_one_tensor(large, quantization, share, is_odd):
    """Of data at odd places there is a copy, of one tensor at a time."""
    path = large / "model.safetensors"
    contents = path.read_bytes()
    if is_odd:
        move_data_to_odd_places(path)
    peak = added(large, quantization=quantization)
    path.write_bytes(contents)
    largest = 4096 * 512 * 4
    assert len(contents) > 100e6
    assert peak < share * len(contents) + (1 + is_odd) * largest + 20e6


def test_a_table_that_is_there_twice_is_compared_piece_by_piece(tmp_path):
    folder = make_checkpoint(
        tmp_path, "llama-tied", hidden_size=512, vocab_size=40_000, num_hidden_layers=1
    )
    tensors = load_file(folder / "model.safetensors")
    table = tensors["model.embed_tokens.weight"]
    save_file({**tensors, "lm_head.weight": table.clone()}, folder / "model.safetensors")
    assert table.nbytes > 80e6
    # What is stored, and what has been read of one table before it is given back.
    assert added(folder, dtype="bfloat16") < 1.5 * table.nbytes + 30e6
