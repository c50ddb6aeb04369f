"""Files from strangers: nothing of them is run, nothing outside their folder is read, and no number
in them makes us take memory that the files do not have."""

import os
import pickle
import shutil
import socket
import struct
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from sglite import LLM, CheckpointError, InvalidRequestError, UnsupportedModelError
from tests import fuzz_loader
from tests.checkpoints import VOCAB_SIZE, edit_json, make_checkpoint, make_tokenizer
from tests.children import run_in_child


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("sound") / "model", dtype=torch.bfloat16)


@pytest.fixture
def folder(sound, tmp_path):
    return Path(shutil.copytree(sound, tmp_path / "model"))


def load(folder, **options):
    with LLM(folder, kv_cache_tokens=64, **options) as llm:
        return llm.generate([5, 6, 7], temperature=0, max_new_tokens=2)


class Payload:
    """A pickle that leaves a mark when it is read."""

    def __init__(self, mark):
        self._mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self._mark,)


def test_no_pickle_is_read(folder, tmp_path):
    mark = tmp_path / "was read"
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "rng_state.pth"):
        (folder / name).write_bytes(pickle.dumps(Payload(mark)))
    load(folder)
    load(folder, architecture="transformers")
    (folder / "model.safetensors").unlink()
    for architecture in (None, "transformers"):
        with pytest.raises(CheckpointError, match="pickles"):
            load(folder, architecture=architecture)
    assert not mark.exists()


REMOTE = """
import os
os.mkdir({mark!r})
"""


@pytest.mark.parametrize("architecture", [None, "transformers", "OwnForCausalLM"])
@pytest.mark.parametrize("model_type", ["llama", "own"])
def test_no_remote_code_is_run_without_trust(folder, tmp_path, architecture, model_type):
    mark = tmp_path / "was run"
    for name in ("configuration_own", "modeling_own", "tokenization_own"):
        (folder / f"{name}.py").write_text(REMOTE.format(mark=str(mark)))
    auto_map = {
        "AutoConfig": "configuration_own.OwnConfig",
        "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
        "AutoTokenizer": ["tokenization_own.OwnTokenizer", None],
    }
    edit_json(folder / "config.json", {"auto_map": auto_map, "model_type": model_type})
    edit_json(
        folder / "tokenizer_config.json",
        {"auto_map": auto_map, "tokenizer_class": "OwnTokenizer"},
    )
    with pytest.raises(CheckpointError):
        load(folder, architecture=architecture)
    assert not mark.exists()


def poison_index(folder, outside):
    edit_json(
        _new(folder / "model.safetensors.index.json"),
        {"weight_map": {"model.norm.weight": f"../{outside.name}/model.safetensors"}},
    )


def poison_absolute_index(folder, outside):
    edit_json(
        _new(folder / "model.safetensors.index.json"),
        {"weight_map": {"model.norm.weight": str(outside / "model.safetensors")}},
    )


def poison_tokenizer_files(folder, outside):
    shutil.copy(outside / "tokenizer.json", outside / "tokenizer.4.0.0.json")
    edit_json(
        folder / "tokenizer_config.json",
        {"fast_tokenizer_files": [f"../{outside.name}/tokenizer.4.0.0.json"]},
    )


def poison_gguf(folder, outside):
    edit_json(folder / "tokenizer_config.json", {"gguf_file": f"../{outside.name}/tokenizer.json"})


@pytest.mark.parametrize(
    "poison", [poison_index, poison_absolute_index, poison_tokenizer_files, poison_gguf]
)
def test_a_name_that_leads_out_of_the_folder_is_refused(sound, folder, poison):
    outside = Path(shutil.copytree(sound, folder.parent / "outside"))
    poison(folder, outside)
    for architecture in (None, "transformers"):
        with pytest.raises(CheckpointError, match=r"same folder"):
            load(folder, architecture=architecture)


def _new(path):
    path.write_text("{}")
    return path


def test_files_that_a_tokenizer_config_names_elsewhere_are_not_used(folder, tmp_path):
    other = make_tokenizer()
    other.add_tokens(["zebra"])
    other.save_pretrained(tmp_path / "other")
    assert VOCAB_SIZE in other.encode("a zebra")
    for tokenizer_class in ("PreTrainedTokenizerFast", "LlamaTokenizer"):
        edit_json(
            folder / "tokenizer_config.json",
            {
                "tokenizer_class": tokenizer_class,
                "tokenizer_file": str(tmp_path / "other" / "tokenizer.json"),
                "vocab_file": str(tmp_path / "other" / "tokenizer.json"),
                "name_or_path": str(tmp_path / "other"),
            },
        )
        with LLM(folder, kv_cache_tokens=64) as llm:
            assert max(llm.tokenizer.encode("a zebra")) < VOCAB_SIZE


def test_an_adapter_of_another_checkpoint_is_refused(sound, folder):
    _new(folder / "adapter_config.json").write_text(
        f'{{"base_model_name_or_path": "{sound}", "peft_type": "LORA"}}'
    )
    load(folder)  # of no interest to a class of ours
    with pytest.raises(UnsupportedModelError, match=r"adapter_config\.json"):
        load(folder, architecture="transformers")


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"]
)
@pytest.mark.timeout(100)  # one that is read waits forever
def test_a_file_that_never_ends_is_no_file(folder, name):
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        load(folder)


@pytest.mark.parametrize("tokenizer_class", ["PreTrainedTokenizerFast", "LlamaTokenizer"])
def test_a_setting_that_a_tokenizer_cannot_use_is_found_when_it_is_loaded(folder, tokenizer_class):
    edit_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": tokenizer_class, "model_max_length": "long"},
    )
    with pytest.raises(CheckpointError, match=f"tokenizer in {folder} cannot be read"):
        load(folder)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vocab_size", 10**10),
        ("hidden_size", 10**10),
        ("intermediate_size", 10**11),
        ("num_hidden_layers", 10**8),
        ("num_attention_heads", 10**9),
        ("num_key_value_heads", 10**9),
        ("head_dim", 10**9),
    ],
)
@pytest.mark.parametrize("architecture", [None, "transformers"])
def test_counts_of_the_config_are_checked_before_anything_is_built(
    folder, field, value, architecture
):
    edit_json(folder / "config.json", {field: value})
    before = fuzz_loader.peak_memory(reset=True)
    with pytest.raises(CheckpointError, match=str(folder)):
        load(folder, architecture=architecture)
    assert fuzz_loader.peak_memory() - before < 200 << 20


@pytest.mark.parametrize("length", [2**30, 2**40, 2**63, 2**64 - 1])
def test_a_header_longer_than_the_file_takes_no_memory(folder, length):
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])
    before = fuzz_loader.peak_memory(reset=True)
    with pytest.raises(CheckpointError, match="cut short"):
        load(folder)
    assert fuzz_loader.peak_memory() - before < 100 << 20


@pytest.mark.parametrize("architecture", [None, "transformers"])
@pytest.mark.parametrize("tokenizer_class", ["PreTrainedTokenizerFast", "LlamaTokenizer", None])
def test_no_network_is_touched_for_a_folder(folder, monkeypatch, architecture, tokenizer_class):
    tried = []

    def refuse(*arguments, **keywords):
        tried.append(arguments)
        raise OSError("no network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    edit_json(folder / "tokenizer_config.json", {"tokenizer_class": tokenizer_class})
    load(folder, architecture=architecture)
    assert not tried


@pytest.mark.parametrize(
    "template",
    [
        "{% include '/etc/passwd' %}",
        "{% extends '../x' %}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.mkdir('x') }}",
        "{% for i in range(10 ** 9) %}{{ i }}{% endfor %}",
        "{{ messages.x.y }}",
        "{% if %}",
    ],
)
def test_a_chat_template_is_a_text_and_no_program(folder, template):
    (folder / "chat_template.jinja").write_text(template)
    with LLM(folder, kv_cache_tokens=256) as llm:
        with pytest.raises(InvalidRequestError, match="template"):
            llm.chat([{"role": "user", "content": "Hi"}])
        assert llm.generate("Hi", temperature=0, max_new_tokens=2).finish_reason == "length"


def test_a_template_that_takes_its_time_keeps_nobody_else_waiting(folder):
    at_work, go_on = threading.Event(), threading.Event()

    def render(*arguments, **keywords):
        at_work.set()
        go_on.wait(300)
        return "a b c"

    with LLM(folder, kv_cache_tokens=256) as llm, ThreadPoolExecutor(2) as pool:
        llm.tokenizer.chat_template = "{{ messages }}"
        llm.tokenizer.apply_chat_template = render
        reply = pool.submit(llm.chat, [{"role": "user", "content": "Hi"}], max_new_tokens=2)
        try:
            assert at_work.wait(100)
            other = pool.submit(llm.generate, "a b", max_new_tokens=2)
            assert other.result(timeout=100).prompt == "a b"
            assert not reply.done()
        finally:
            go_on.set()
        assert reply.result(timeout=100).prompt == "a b c"


def read_only_of_the_folder(make, use, files):
    """Prints which files Python opens outside a checkpoint's folder while it is used.

    Args:
        make: writes a checkpoint to a folder.
        use: loads it, with an architecture.
        files: which of its JSON files are to name others.
    """
    with tempfile.TemporaryDirectory() as name:
        secret = Path(name) / "secret"
        secret.mkdir()
        for file in ("config.json", "tokenizer.json", "model.safetensors", "vocab.json"):
            (secret / file).write_text("{}")
        folder = make(Path(name) / "model")
        named = {
            "_name_or_path": str(secret),
            "name_or_path": str(secret),
            "tokenizer_file": str(secret / "tokenizer.json"),
            "vocab_file": str(secret / "vocab.json"),
            "added_tokens_file": str(secret / "config.json"),
            "chat_template_file": str(secret / "config.json"),
            "special_tokens_map_file": str(secret / "config.json"),
            "base_model_name_or_path": str(secret),
            "image_processor_file": str(secret / "config.json"),
            "audio_tokenizer": {"audio_tokenizer_name_or_path": str(secret)},
        }
        for file in files:
            if (folder / file).exists():
                edit_json(folder / file, named)
        opened = []

        def hook(event, arguments):
            if event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
                opened.append(os.fsdecode(arguments[0]))

        sys.addaudithook(hook)
        for architecture in (None, "transformers"):
            use(folder, architecture=architecture)
        # Packages are looked for in the working folder too, by names relative to it.
        paths = [os.path.abspath(path) for path in opened]
        assert any(path.startswith(str(folder)) for path in paths)
        assert not [path for path in paths if path.startswith(str(secret))]
        # An installation for development looks for itself under a name that is no path.
        places = (
            str(folder),
            os.path.abspath("__editable__"),
            sys.prefix,
            sys.base_prefix,
            str(Path(__file__).parents[2]),
        )
        others = [p for p in paths if not p.startswith((*places, "/proc", "/sys", "/dev"))]
        print(sorted(set(others)))


def open_what_strangers_name():
    """A child process: which files Python opens while a checkpoint is read that names others."""
    files = ("config.json", "tokenizer_config.json", "generation_config.json")
    read_only_of_the_folder(lambda to: make_checkpoint(to, dtype=torch.bfloat16), load, files)


def test_only_files_of_the_folder_are_opened():
    assert run_in_child(open_what_strangers_name) == "[]\n"


def test_the_fuzzer_sees_what_is_wrong(monkeypatch, tmp_path):
    seen = []

    def broken(folder, **options):
        if folder.name in fuzz_loader.BASES:
            return LLM(folder, **options)
        seen.append(folder)
        if len(seen) == 1:
            raise KeyError("planted")
        if len(seen) == 2:
            raise CheckpointError("something is wrong somewhere")
        raise CheckpointError(f"{folder} is broken")

    fuzz_loader.make_bases(tmp_path, ["llama"])
    monkeypatch.setattr("sglite.LLM", broken)
    problems = fuzz_loader.fuzz(0, 5, tmp_path)
    assert len(problems) == 2
    assert "KeyError" in problems[0]
    assert "names no file" in problems[1]


def test_mutated_checkpoints():
    """The short form of `make fuzz`."""
    assert fuzz_loader.run(seed=1_000_000, mutations=60) == []
