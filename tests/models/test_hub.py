"""Hub models, against a hub on this machine; every call in a process with its own settings."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from tests.checkpoints import make_checkpoint
from tests.models.hub_server import COMMIT, serve

REPO = "someone/small-model"

_CODE = """
import sys
from sglite.interface.errors import CheckpointError
from sglite.models.checkpoint import load_tokenizer, resolve_checkpoint
from sglite.models.loader import load_model
name, cache, revision, tokenizer = sys.argv[1:5]
try:
    checkpoint = resolve_checkpoint(name, cache_dir=cache, revision=revision or None)
except CheckpointError as error:
    print("refused:", error)
else:
    load_tokenizer(checkpoint, tokenizer or None, cache_dir=cache)
    print(load_model(checkpoint).architecture, *(file.name for file in checkpoint.weight_files))
"""


def resolve(
    cache, *, endpoint="http://127.0.0.1:9", name=REPO, revision="", tokenizer="", offline=False
):
    """What the process above prints."""
    arguments = (name, cache, revision, tokenizer)
    return run(_CODE, *arguments, endpoint=endpoint, offline=offline)


def run(code, *arguments, endpoint="http://127.0.0.1:9", offline=False):
    """What a process prints that runs some code."""
    environment = {
        **os.environ,
        "HF_ENDPOINT": endpoint,
        "HF_HUB_OFFLINE": "1" if offline else "0",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }
    finished = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        check=True,
        capture_output=True,
        text=True,
        env=environment,
    )
    return finished.stdout.strip()


@pytest.fixture
def repository(tmp_path):
    """A sharded checkpoint, and files in other formats that are nobody's business."""
    folder = make_checkpoint(tmp_path / "repository", shard_size="100KB")
    torch.save({}, folder / "pytorch_model.bin")
    for name in ("consolidated.safetensors", "adapter.safetensors", "README.md", "model.gguf"):
        (folder / name).write_bytes(b"not needed")
    return folder


def test_only_the_files_needed_and_each_once(repository, tmp_path):
    shards = sorted(file.name for file in repository.glob("model-*.safetensors"))
    with serve(repository, REPO) as (endpoint, asked):
        first = resolve(tmp_path / "cache", endpoint=endpoint)
        assert first == " ".join(["LlamaForCausalLM", *shards])
        assert sorted(asked) == sorted(
            [
                "config.json",
                "generation_config.json",
                "model.safetensors.index.json",
                *shards,
                *(file.name for file in repository.glob("tokenizer*")),
                *(file.name for file in repository.glob("chat_template*")),
            ]
        )
        asked.clear()
        assert resolve(tmp_path / "cache", endpoint=endpoint, revision=COMMIT) == first
        assert asked == []
    # The hub is gone; so is the wish to ask it.
    assert resolve(tmp_path / "cache") == first
    assert resolve(tmp_path / "cache", offline=True) == first


#: Makes an LLM of the model and has it look at a picture; prints what it says.
_LOOK = """
import sys
from PIL import Image
from sglite import LLM
with LLM(sys.argv[1], cache_dir=sys.argv[2], kv_cache_tokens=512) as llm:
    image = Image.new("RGB", (64, 64), "red")
    part = {"type": "image", "image": image}
    text = {"type": "text", "text": "Name the colour of the figure."}
    llm.chat([{"role": "user", "content": [part, text]}], max_new_tokens=1)
    print(llm.generate("<image>What?", images=image, temperature=0, max_new_tokens=4).text)
"""


def test_a_model_that_sees_comes_with_what_it_sees_with(tmp_path):
    from sglite.models.checkpoint import resolve_checkpoint

    folder = tmp_path / "repository"
    shutil.copytree(resolve_checkpoint("demo-vl").folder, folder)
    for name in ("processor_config.json", "video_preprocessor_config.json", "chat_template.json"):
        (folder / name).write_text(json.dumps({"own": name}))
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ messages }}")
    files = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}
    with serve(folder, REPO) as (endpoint, asked):
        answer = run(_LOOK, REPO, tmp_path / "cache", endpoint=endpoint)
    assert sorted(asked) == sorted(files - {"README.md"})
    assert answer == run(_LOOK, "demo-vl", tmp_path / "cache")


def test_a_single_file(tmp_path):
    folder = make_checkpoint(tmp_path / "repository")
    with serve(folder, REPO) as (endpoint, _):
        answer = resolve(tmp_path / "cache", endpoint=endpoint)
    assert answer == "LlamaForCausalLM model.safetensors"


def test_a_tokenizer_of_the_hub_comes_without_weights(repository, tmp_path):
    with serve(repository, REPO) as (endpoint, asked):
        local = str(repository)
        answer = resolve(tmp_path / "cache", endpoint=endpoint, name=local, tokenizer=REPO)
    assert answer.startswith("LlamaForCausalLM")
    assert "tokenizer.json" in asked
    assert not any(name.endswith((".safetensors", ".bin")) for name in asked)


def test_pickles_are_not_even_downloaded(tmp_path):
    folder = make_checkpoint(tmp_path / "repository")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with serve(folder, REPO) as (endpoint, asked):
        answer = resolve(tmp_path / "cache", endpoint=endpoint)
    assert f"refused: the weights in {REPO} are pickles (pytorch_model.bin)" in answer
    assert f"from_pretrained({REPO!r}).save_pretrained" in answer
    assert "pytorch_model.bin" not in asked


def test_no_weights_at_all(tmp_path):
    folder = make_checkpoint(tmp_path / "repository")
    (folder / "model.safetensors").unlink()
    with serve(folder, REPO) as (endpoint, _):
        answer = resolve(tmp_path / "cache", endpoint=endpoint)
    assert f"refused: no weights in {REPO}: expected model.safetensors" in answer
    assert resolve(tmp_path / "cache", offline=True) == answer


def test_what_is_not_there(repository, tmp_path):
    with serve(repository, REPO) as (endpoint, _):
        answer = resolve(tmp_path / "cache", endpoint=endpoint, name="someone/else")
    assert "refused: 'someone/else' is neither a folder here nor a model on the hub" in answer


@pytest.mark.parametrize("offline", [True, False])
def test_no_hub_and_nothing_in_the_cache(tmp_path, offline):
    answer = resolve(tmp_path / "cache", offline=offline)
    assert f"refused: '{REPO}' is no folder here, and the hub cannot be reached" in answer


def test_a_name_that_no_model_can_have(tmp_path):
    answer = resolve(tmp_path / "cache", name="some--one/model..")
    assert "refused: 'some--one/model..' is neither a folder nor a hub id" in answer
