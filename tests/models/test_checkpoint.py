"""Finding a checkpoint's files, and what is said where they are missing or broken."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sglite import CheckpointError, UnsupportedModelError
from sglite.models.checkpoint import errors_name_files, load_tokenizer, resolve_checkpoint
from tests.checkpoints import make_checkpoint, make_tokenizer


def test_a_folder_as_string_path_or_from_home(sound, monkeypatch):
    monkeypatch.setenv("HOME", str(sound.parent))
    for model in (str(sound), sound, f"~/{sound.name}"):
        checkpoint = resolve_checkpoint(model)
        assert checkpoint.folder == sound
        assert checkpoint.config["model_type"] == "llama"
        assert checkpoint.weight_files == (sound / "model.safetensors",)
    assert checkpoint.generation_config["eos_token_id"] == 1


def test_a_relative_folder_that_looks_like_a_hub_id(sound, monkeypatch):
    monkeypatch.chdir(sound.parent.parent)
    name = f"{sound.parent.name}/{sound.name}"
    assert resolve_checkpoint(name).folder == Path(name)


def test_without_generation_config(folder):
    (folder / "generation_config.json").unlink()
    assert resolve_checkpoint(folder).generation_config is None


def test_shards_by_the_index(tmp_path):
    folder = make_checkpoint(tmp_path, shard_size="100KB")
    files = resolve_checkpoint(folder).weight_files
    assert len(files) > 2
    assert files == tuple(sorted(folder.glob("model-*.safetensors")))


def test_a_second_copy_of_the_weights_is_left_alone(folder):
    shutil.copy(folder / "model.safetensors", folder / "consolidated.safetensors")
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    assert resolve_checkpoint(folder).weight_files == (folder / "weights.safetensors",)


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "a/b/c", "no where", "..", "a/"])
def test_a_path_that_is_not_there(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if name == "..":
        name = "../nowhere"
    with pytest.raises(CheckpointError, match=f"there is no folder {name}"):
        resolve_checkpoint(name)


def test_a_name_that_is_too_long_for_a_file():
    with pytest.raises(CheckpointError):
        resolve_checkpoint("/" + 300 * "x")


def test_a_path_object_is_never_a_hub_id():
    with pytest.raises(CheckpointError, match="there is no folder"):
        resolve_checkpoint(Path("owner/name"))


def test_a_file_instead_of_a_folder(folder):
    with pytest.raises(CheckpointError, match=r"model\.safetensors is a file; a model is a folder"):
        resolve_checkpoint(folder / "model.safetensors")


def test_what_is_neither_a_name_nor_a_module():
    with pytest.raises(UnsupportedModelError, match="dict is no torch.nn.Module: pass a folder"):
        resolve_checkpoint({})


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("no such count", "{folder}/config.json: no such count"),
        ("config.json: no such count", "{folder}/config.json: no such count"),
        ("{folder}/tokenizer.json is broken", "{folder}/tokenizer.json is broken"),
        ("tokenizer='a/b': is nowhere", "tokenizer='a/b': is nowhere"),
    ],
)
def test_errors_name_files(folder, message, expected):
    checkpoint = resolve_checkpoint(folder)
    with pytest.raises(CheckpointError) as caught, errors_name_files(checkpoint):
        raise CheckpointError(message.format(folder=folder))
    assert str(caught.value) == expected.format(folder=folder)


def test_what_is_not_implemented_names_the_folder(folder):
    with (
        pytest.raises(UnsupportedModelError) as caught,
        errors_name_files(resolve_checkpoint(folder)),
    ):
        raise UnsupportedModelError("there is no kernel for it")
    assert str(caught.value) == f"{folder}: there is no kernel for it"


def test_a_tokenizer_that_is_nowhere(folder, monkeypatch):
    def nowhere(name, **options):
        raise CheckpointError(f"{name} is nowhere")

    monkeypatch.setattr("sglite.models.checkpoint.download_tokenizer", nowhere)
    checkpoint = resolve_checkpoint(folder)
    with pytest.raises(CheckpointError) as caught, errors_name_files(checkpoint):
        load_tokenizer(checkpoint, "no-one/nothing")
    assert str(caught.value) == "tokenizer='no-one/nothing': no-one/nothing is nowhere"


def test_no_config(folder):
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=f"no config.json in {folder}"):
        resolve_checkpoint(folder)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("contents", ["{", "", "\xff", "[1]", "[" * 100_000])
def test_broken_json(folder, name, contents):
    (folder / name).write_text(contents, encoding="latin-1")
    with pytest.raises(CheckpointError, match=str(folder / name)):
        resolve_checkpoint(folder)


def test_no_weights(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=f"no weights in {folder}: expected model.safetens"):
        resolve_checkpoint(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickles_are_refused_saying_how_to_convert(folder, name):
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / name)
    with pytest.raises(CheckpointError, match="are pickles") as caught:
        resolve_checkpoint(folder)
    assert name in str(caught.value)
    assert "save_pretrained" in str(caught.value)


def test_what_the_message_says_converts(folder, tmp_path):
    """The advice is a line of Python that works as it stands."""
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "new")
    assert (tmp_path / "new" / "model.safetensors").exists()


def test_gguf_is_refused(folder):
    (folder / "model.safetensors").rename(folder / "model.gguf")
    with pytest.raises(CheckpointError, match="GGUF files, which are not read"):
        resolve_checkpoint(folder)


def test_missing_shards_are_named(tmp_path):
    folder = make_checkpoint(tmp_path, shard_size="100KB")
    gone = sorted(folder.glob("model-*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(CheckpointError, match=f"files that are not there: {gone.name}"):
        resolve_checkpoint(folder)


class TestTokenizer:
    def test_the_one_beside_the_weights(self, sound):
        tokenizer = load_tokenizer(resolve_checkpoint(sound))
        text = "tokens, more tokens"
        assert tokenizer.encode(text) == make_tokenizer().encode(text)
        assert tokenizer.chat_template == make_tokenizer().chat_template

    def test_one_from_elsewhere(self, sound, folder):
        checkpoint = resolve_checkpoint(sound)
        given = make_tokenizer()
        assert load_tokenizer(checkpoint, given) is given
        for path in (folder, str(folder)):
            assert load_tokenizer(checkpoint, path).encode("a") == given.encode("a")

    def test_none(self, folder):
        for path in folder.glob("tokenizer*"):
            path.unlink()
        checkpoint = resolve_checkpoint(folder)
        with pytest.raises(CheckpointError, match=f"no tokenizer in {folder}.*pass tokenizer="):
            load_tokenizer(checkpoint)
        assert load_tokenizer(checkpoint, make_tokenizer())

    def test_a_broken_one(self, folder):
        (folder / "tokenizer.json").write_text('{"model": ')
        with pytest.raises(CheckpointError, match=f"the tokenizer in {folder} cannot be read"):
            load_tokenizer(resolve_checkpoint(folder))

    def test_with_a_config_that_transformers_does_not_know(self, folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "model_type": "unheard-of"}))
        assert load_tokenizer(resolve_checkpoint(folder)).encode("a")

    def test_its_own_code_does_not_run(self, folder):
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        settings["auto_map"] = {"AutoTokenizer": ["evil.Tokenizer", None]}
        settings["tokenizer_class"] = "Tokenizer"
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        (folder / "evil.py").write_text("open('ran', 'w')\nclass Tokenizer: pass\n")
        with contextlib.suppress(CheckpointError):
            load_tokenizer(resolve_checkpoint(folder))
        assert not Path("ran").exists()


def test_a_local_path_touches_no_network(sound):
    """In a process of its own, where any socket is an error."""
    code = f"""
import socket
def refuse(*arguments, **keywords):
    raise AssertionError("a socket was asked for")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
from sglite.models.checkpoint import load_tokenizer, resolve_checkpoint
from sglite.models.loader import load_model
checkpoint = resolve_checkpoint({str(sound)!r})
load_tokenizer(checkpoint)
load_model(checkpoint)
"""
    environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
