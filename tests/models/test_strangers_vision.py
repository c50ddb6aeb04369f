"""Files from strangers, of models that see: as `test_strangers.py`, also for what makes pixels."""

import json
import os
import shutil
import socket
import time
from contextlib import suppress
from pathlib import Path

import pytest

from sglite import LLM, CheckpointError
from tests.checkpoints import edit_json, make_tokenizer
from tests.children import run_in_child
from tests.fuzz_loader import peak_memory
from tests.models.test_strangers import REMOTE, read_only_of_the_folder
from tests.vision_checkpoints import make_vision_checkpoint, picture

PICTURE = picture(50, 40)
PROCESSOR_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "chat_template.json",
)


def look(folder, **options):
    with LLM(folder, kv_cache_tokens=256, **options) as llm:
        return llm.generate("<image>", images=PICTURE, temperature=0, max_new_tokens=2)


VISION_COUNTS = {
    "qwen2-vl": [
        {"depth": 10**8},
        {"embed_dim": 10**10},
        {"hidden_size": 10**10},
        {"num_heads": 10**9},
        {"mlp_ratio": 10**10},
        {"patch_size": 10**6},
    ],
    "qwen2.5-vl": [{"depth": 10**8}, {"intermediate_size": 10**11}, {"out_hidden_size": 10**10}],
    **{
        name: [
            {"num_hidden_layers": 10**8},
            {"image_size": 10**5, "patch_size": 1},
            {"hidden_size": 10**10},
            {"intermediate_size": 10**11},
        ]
        for name in ("llava", "llava-next", "llava-onevision", "gemma3")
    },
}


@pytest.fixture(scope="module")
def sound_vision(tmp_path_factory):
    """Makes the vision-language checkpoint of a name, once."""
    made = {}

    def make(name):
        if name not in made:
            made[name] = make_vision_checkpoint(tmp_path_factory.mktemp("vision") / name, name)
        return made[name]

    return make


@pytest.fixture
def vision_folder(sound_vision, tmp_path):
    return lambda name: Path(shutil.copytree(sound_vision(name), tmp_path / "model"))


@pytest.mark.parametrize("architecture", [None, "transformers"])
@pytest.mark.parametrize(
    ("name", "values"),
    [(name, values) for name, cases in VISION_COUNTS.items() for values in cases],
)
def test_counts_of_vision_towers_are_checked_before_anything_is_built(
    vision_folder, name, values, architecture
):
    folder = vision_folder(name)
    vision = json.loads((folder / "config.json").read_text())["vision_config"]
    edit_json(folder / "config.json", {"vision_config": {**vision, **values}})
    before, started = peak_memory(reset=True), time.process_time()
    with pytest.raises(CheckpointError, match=str(folder)):
        look(folder, architecture=architecture)
    assert peak_memory() - before < 200 << 20
    assert time.process_time() - started < 10


def test_counts_of_the_language_model_within_are_checked_too(vision_folder):
    folder = vision_folder("llava")
    text = json.loads((folder / "config.json").read_text())["text_config"]
    edit_json(folder / "config.json", {"text_config": {**text, "num_hidden_layers": 10**8}})
    with pytest.raises(CheckpointError, match=r"text_config\.num_hidden_layers=100000000"):
        look(folder)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("qwen2-vl", {"min_pixels": 10**12}),
        (
            "qwen2-vl",
            {
                "size": {"shortest_edge": 10**12, "longest_edge": 10**13},
                "min_pixels": None,
                "max_pixels": None,
            },
        ),
        ("qwen2-vl", {"patch_size": 10**6}),
        ("qwen2-vl", {"temporal_patch_size": 10**9}),
        ("llava", {"size": {"shortest_edge": 10**6}}),
        ("llava", {"crop_size": {"height": 10**6, "width": 10**6}}),
        ("llava-next", {"image_grid_pinpoints": [[24, 10**7]]}),
        ("llava-onevision", {"size": {"height": 10**6, "width": 10**6}}),
        ("gemma3", {"size": {"height": 10**6, "width": 10**6}}),
    ],
)
def test_sizes_to_which_pictures_are_scaled_are_checked(vision_folder, name, values):
    folder = vision_folder(name)
    edit_json(folder / "preprocessor_config.json", values)
    before = peak_memory(reset=True)
    with pytest.raises(CheckpointError, match=f"{folder}.*at most"):
        look(folder)
    assert peak_memory() - before < 200 << 20


@pytest.mark.parametrize("architecture", [None, "transformers"])
@pytest.mark.parametrize("file", ["preprocessor_config.json", "processor_config.json"])
def test_no_remote_code_makes_pixels_without_trust(vision_folder, tmp_path, architecture, file):
    folder, mark = vision_folder("qwen2-vl"), tmp_path / "was run"
    auto_map = {}
    for name in ("ImageProcessor", "Processor", "VideoProcessor", "FeatureExtractor"):
        module = f"own_{name.lower()}"
        (folder / f"{module}.py").write_text(REMOTE.format(mark=str(mark)))
        auto_map[f"Auto{name}"] = f"{module}.Own{name}"
    images = json.loads((folder / "preprocessor_config.json").read_text())
    kinds = {
        "auto_map": auto_map,
        "processor_class": "OwnProcessor",
        "image_processor_type": "OwnImageProcessor",
    }
    (folder / "preprocessor_config.json").unlink()
    (folder / file).write_text(json.dumps({**images, **kinds, "image_processor": kinds}))
    with pytest.raises(CheckpointError, match=str(folder)):
        look(folder, architecture=architecture)
    assert not mark.exists()


@pytest.mark.parametrize("architecture", [None, "transformers"])
def test_no_network_is_touched_for_a_folder(vision_folder, monkeypatch, architecture):
    tried = []

    def refuse(*arguments, **keywords):
        tried.append(arguments)
        raise OSError("no network")

    folder = vision_folder("qwen2-vl")
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    assert len(look(folder, architecture=architecture).token_ids) == 2
    edit_json(folder / "preprocessor_config.json", {"image_processor_type": None})
    edit_json(folder / "config.json", {"_name_or_path": "somebody/something"})
    with suppress(CheckpointError):
        look(folder, architecture=architecture)
    assert not tried


def open_what_strangers_name():
    """A child process: as in `test_strangers.py`."""
    files = ("config.json", "tokenizer_config.json", *PROCESSOR_FILES)
    read_only_of_the_folder(make_vision_checkpoint, look, files)


def test_only_files_of_the_folder_are_opened():
    assert run_in_child(open_what_strangers_name) == "[]\n"


@pytest.mark.parametrize("file", PROCESSOR_FILES)
def test_a_file_that_never_ends_is_no_file(vision_folder, file):
    folder = vision_folder("qwen2-vl")
    (folder / file).unlink(missing_ok=True)
    os.mkfifo(folder / file)
    with pytest.raises(CheckpointError, match=f"{file} is no regular file"):
        look(folder)
    with pytest.raises(CheckpointError, match=f"{file} is no regular file"):
        look(folder, tokenizer=make_tokenizer())


@pytest.mark.parametrize("file", PROCESSOR_FILES)
@pytest.mark.parametrize("contents", ["[" * 10_000, "[]", "{", "\x00"])
def test_a_broken_file_is_named(vision_folder, file, contents):
    folder = vision_folder("qwen2-vl")
    (folder / file).write_text(contents)
    with pytest.raises(CheckpointError, match=str(folder)):
        look(folder)
