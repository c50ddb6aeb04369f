"""What loading adds to a process's memory at most."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoints import make_checkpoint
from tests.children import ROOT
from tests.models.loading import move_data_to_odd_places

pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")

# Prints the bytes that loading adds at most, for each checkpoint and its arguments.
MEASURE = """
import gc, json, re, sys
from tests.models.loading import load
from sglite import _C

def memory(kind):
    return int(re.search(kind + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024

added = []
for folder, arguments in json.load(sys.stdin):
    # The first time brings in the library's code as well: how much, depends on what the system
    # has in its cache of files.
    load(folder, **arguments)
    gc.collect()
    _C.trim_heap()
    open("/proc/self/clear_refs", "w").write("5")
    before = memory("VmRSS")
    loaded = load(folder, **arguments)
    added.append(memory("VmHWM") - before)
    del loaded
print(json.dumps(added))
"""
LARGEST = 4096 * 512  # elements of the largest tensor of the two large checkpoints


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Checkpoints: float32 and bfloat16, data at odd places, an embedding that is there twice."""
    root = tmp_path_factory.mktemp("large")
    sizes = {"hidden_size": 512, "intermediate_size": 4096, "num_attention_heads": 8}
    make_checkpoint(root / "float32", num_hidden_layers=6, **sizes)
    shutil.copytree(root / "float32", root / "odd")
    move_data_to_odd_places(root / "odd" / "model.safetensors")
    make_checkpoint(root / "bfloat16", num_hidden_layers=12, dtype=torch.bfloat16, **sizes)
    tied = {"hidden_size": 512, "vocab_size": 40_000, "num_hidden_layers": 1}
    twice = make_checkpoint(root / "twice", "llama-tied", **tied) / "model.safetensors"
    tensors = load_file(twice)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, twice)
    yield root
    shutil.rmtree(root)


CASES = [
    *[(name, {"quantization": q}) for name in ("float32", "odd") for q in (None, "int8")],
    *[("bfloat16", {"quantization": method}) for method in ("int8", "int4")],
    ("twice", {"dtype": "bfloat16"}),
]


@pytest.fixture(scope="module")
def added(folders):
    """What loading adds, by the checkpoint and the first argument; measured in one process."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE],
        input=json.dumps([(str(folders / name), arguments) for name, arguments in CASES]),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    keys = [(name, *arguments.values()) for name, arguments in CASES]
    return dict(zip(keys, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize(("quantization", "share"), [(None, 1.0), ("int8", 0.26)])
@pytest.mark.parametrize("name", ["float32", "odd"])
def test_is_that_of_the_checkpoint_and_one_tensor(folders, added, name, quantization, share):
    """Of data at odd places there is a copy, of one tensor at a time."""
    size = os.path.getsize(folders / name / "model.safetensors")
    assert size > 100e6
    copies = 2 if name == "odd" else 1
    assert added[name, quantization] < share * size + copies * LARGEST * 4 + 20e6


@pytest.mark.parametrize(("method", "share"), [("int8", 1.0), ("int4", 0.55)])
def test_is_that_of_the_codes_and_one_tensor(folders, added, method, share):
    """Never a second copy of the checkpoint."""
    size = os.path.getsize(folders / "bfloat16" / "model.safetensors") // 2  # in 8 bits
    assert size > 70e6
    assert added["bfloat16", method] < share * size + LARGEST * 2 + 40e6


def test_a_table_that_is_there_twice_is_compared_piece_by_piece(added):
    table = 40_000 * 512 * 4
    # What is stored, and what has been read of one table before it is given back.
    assert added["twice", "bfloat16"] < 1.5 * table + 20e6
