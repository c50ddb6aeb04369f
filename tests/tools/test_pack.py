"""Packed checkpoints: the same bits as the original's, where they lie, and every refusal."""

import gc
import json
import mmap
import random
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch

from sglite import (
    LLM,
    CheckpointError,
    ConfigError,
    ModelRegistry,
    UnsupportedModelError,
    compare,
    pack,
)
from sglite.interface.errors import SGLiteError
from sglite.models.checkpoint import load_tokenizer, resolve_checkpoint
from sglite.models.llama import LlamaForCausalLM
from sglite.models.packed_checkpoint import SETTINGS
from sglite.models.packing import write_aligned
from sglite.ops import PackedWeight
from tests.checkpoints import edit_json, make_checkpoint
from tests.command_line import run
from tests.models.loading import load, logits_of
from tests.ops.test_weight_memory import mapped_bytes, wait_for_mapping
from tests.quantized_checkpoints import gptq, quantize_checkpoint

WAYS = {
    "bfloat16": ("llama", {"dtype": "bfloat16"}),
    "float32": ("llama", {}),
    "tied": ("qwen3", {"dtype": "float16"}),
    "biases": ("qwen2", {}),
    "experts": ("mixtral", {"dtype": "bfloat16"}),
    "int8": ("llama", {"quantization": "int8"}),
    "int4": ("qwen3", {"quantization": "int4", "dtype": "bfloat16"}),
}


def packed_file(folder):
    return folder / "packed.safetensors"


def rewrite(folder, change):
    """Has `change` edit the tensors and the metadata of a packed file."""
    path = packed_file(folder)
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    matrices = json.loads(metadata["matrices"])
    change(tensors, matrices)
    path.unlink()  # whoever has it mapped keeps what was there
    write_aligned(path, tensors, {"matrices": json.dumps(matrices)})


def make_shuffled_gptq(folder):
    """Quantised, with groups of columns that are no neighbours."""
    random_numbers = np.random.default_rng(0)
    make_checkpoint(folder, "llama")
    quantize_checkpoint(folder, *gptq(random_numbers, shuffled=True))
    return folder


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("original")
    return make_checkpoint(folder, "llama", dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def sound(original, tmp_path_factory):
    return pack(original, tmp_path_factory.mktemp("packed") / "sound")


@pytest.fixture
def folder(sound, tmp_path):
    return Path(shutil.copytree(sound, tmp_path / "copy"))


class TestResults:
    @pytest.mark.parametrize("way", WAYS)
    def test_bits_are_the_originals(self, way, tmp_path):
        family, options = WAYS[way]
        make_checkpoint(tmp_path / "plain", family)
        made = pack(tmp_path / "plain", tmp_path / "packed", **options)
        expected = load(tmp_path / "plain", **options)
        found = load(made)
        assert torch.equal(logits_of(found), logits_of(expected))
        assert (found.dtype, found.quantization) == (expected.dtype, expected.quantization)

    @pytest.mark.skipif(sys.platform != "linux", reason="asks Linux which pages are mapped")
    def test_the_file_is_mapped_before_the_first_step(self, folder):
        path = packed_file(folder)
        with LLM(folder, kv_cache_tokens=64):
            wait_for_mapping()
            assert mapped_bytes(path) >= path.stat().st_size // mmap.PAGESIZE * mmap.PAGESIZE
        gc.collect()
        assert mapped_bytes(path) is None

    def test_groups_of_columns_that_are_no_neighbours(self, tmp_path):
        plain = make_shuffled_gptq(tmp_path / "plain")
        found = load(pack(plain, tmp_path / "packed"))
        assert torch.equal(logits_of(found), logits_of(load(plain)))
        assert found.quantization == "gptq"

    def test_text_and_pictures(self, tmp_path):
        picture = next((Path(__file__).parents[2] / "examples" / "pictures").glob("*.png"))
        answers = []
        for model in ("demo-vl", pack("demo-vl", tmp_path / "packed", quantization="int8")):
            with LLM(model, quantization="int8", kv_cache_tokens=2048) as llm:
                prompt = {"text": "<image>What is this?", "images": [str(picture)]}
                answers.append(llm.generate(prompt, temperature=0, max_new_tokens=8, logprobs=2))
        assert answers[0].text == answers[1].text
        assert answers[0].logprobs == answers[1].logprobs

    def test_a_class_of_ones_own(self, original, tmp_path, monkeypatch):
        class OwnLlama(LlamaForCausalLM):
            pass

        monkeypatch.setitem(ModelRegistry.models, "OwnLlama", OwnLlama)
        made = pack(original, tmp_path / "packed", architecture="OwnLlama")
        assert type(load(made).model) is OwnLlama


class TestTheFolder:
    def test_it_holds_all_but_the_weights(self, original, sound):
        kept = {p.name for p in original.iterdir()} - {"model.safetensors"}
        assert {p.name for p in sound.iterdir()} == kept | {"packed.safetensors"}
        config = json.loads((sound / "config.json").read_text())
        assert config.pop(SETTINGS) == {"version": 1, "dtype": "bfloat16", "quantization": None}
        assert config == json.loads((original / "config.json").read_text())

    def test_the_tokenizer_is_the_same_and_is_parsed_once(self, original, sound, monkeypatch):
        parsed = []
        parse = json.load

        def note(file, **keywords):
            parsed.append(Path(file.name).name)
            return parse(file, **keywords)

        monkeypatch.setattr("transformers.tokenization_utils_base.json.load", note)
        expected = load_tokenizer(resolve_checkpoint(original))
        assert "tokenizer.json" in parsed  # or the list of added tokens is no use any more
        parsed.clear()
        found = load_tokenizer(resolve_checkpoint(sound))
        assert "tokenizer.json" not in parsed
        assert found.added_tokens_decoder == expected.added_tokens_decoder
        assert found.special_tokens_map == expected.special_tokens_map
        assert found.backend_tokenizer.to_str() == expected.backend_tokenizer.to_str()

    @pytest.mark.parametrize(
        ("name", "contents"),
        [
            ("special_tokens_map.json", {"pad_token": "<unk>"}),
            ("added_tokens.json", {"<new>": 10_000}),
        ],
    )
    def test_older_files_of_a_tokenizer_are_still_read(self, name, contents, tmp_path):
        plain = make_checkpoint(tmp_path / "plain", "llama")
        (plain / name).write_text(json.dumps(contents))
        made = load_tokenizer(resolve_checkpoint(pack(plain, tmp_path / "packed")))
        expected = load_tokenizer(resolve_checkpoint(plain))
        assert made.added_tokens_decoder == expected.added_tokens_decoder
        assert made.special_tokens_map == expected.special_tokens_map

    @pytest.mark.parametrize("added", [None, {"id": 1}, ["<s>"], [{"content": "<s>"}]])
    def test_added_tokens_that_are_none_are_left_to_the_reader(self, added, tmp_path):
        plain = make_checkpoint(tmp_path / "plain", "llama")
        edit_json(plain / "tokenizer.json", {"added_tokens": added})
        made = pack(plain, tmp_path / "packed")
        for name in ("tokenizer.json", "tokenizer_config.json"):
            assert (made / name).read_text() == (plain / name).read_text()

    def test_matrices_begin_at_cache_lines(self, tmp_path):
        """Also behind tensors of odd sizes, and in the place where the format's library reads."""
        tensors = {
            "odd": torch.arange(3, dtype=torch.int8),
            "whole": torch.arange(64, dtype=torch.float32),
            "scalar": torch.tensor(7.0),
            "next": torch.arange(32, dtype=torch.bfloat16),
        }
        path = tmp_path / "some.safetensors"
        write_aligned(path, tensors, {"a": "b"})
        contents = path.read_bytes()
        start = 8 + int.from_bytes(contents[:8], "little")
        header = json.loads(contents[8:start])
        places = [start + header[name]["data_offsets"][0] for name in ("whole", "next")]
        assert [place % 64 for place in places] == [0, 0]
        with safetensors.safe_open(path, "pt") as file:
            assert file.metadata() == {"a": "b"}
            for name, tensor in tensors.items():
                assert torch.equal(file.get_tensor(name), tensor)

    def test_weights_lie_in_the_file_as_long_as_the_model_lives(self, sound):
        def is_mapped():
            return str(packed_file(sound)) in Path("/proc/self/maps").read_text()

        loaded = load(sound)
        gc.collect()
        assert is_mapped()
        assert loaded.mapped_bytes > 0.9 * packed_file(sound).stat().st_size
        assert {type(loaded.model.lm_head.matrix.stored)} == {PackedWeight}
        del loaded
        gc.collect()
        assert not is_mapped()

    def test_assigning_a_weight_leaves_the_file_alone(self, folder):
        before = packed_file(folder).read_bytes()
        loaded = load(folder)
        layer = loaded.model.model.layers[0].mlp.down_proj
        layer.weight = layer.weight * 2
        assert not torch.equal(logits_of(loaded), logits_of(load(folder)))
        assert packed_file(folder).read_bytes() == before

    def test_what_fails_leaves_nothing(self, original, tmp_path, monkeypatch):
        def fail(*_):
            raise OSError("no space left")

        monkeypatch.setattr("sglite.models.packing.write_aligned", fail)
        with pytest.raises(OSError, match="no space"):
            pack(original, tmp_path / "new" / "packed")
        assert list((tmp_path / "new").iterdir()) == []


class TestRefusals:
    def test_a_folder_that_is_there(self, original, tmp_path):
        (tmp_path / "file").write_text("precious")
        with pytest.raises(ConfigError, match="is there already"):
            pack(original, tmp_path)
        with pytest.raises(ConfigError, match="is there already"):
            pack(original, tmp_path / "file")

    def test_packing_twice(self, sound, tmp_path):
        with pytest.raises(UnsupportedModelError, match="packed already"):
            pack(sound, tmp_path / "again")

    def test_hugging_faces_class(self, original, tmp_path, sound):
        with pytest.raises(UnsupportedModelError, match="Hugging Face's class"):
            pack(original, tmp_path / "packed", architecture="transformers")
        with pytest.raises(UnsupportedModelError, match="takes no packed weights"):
            load(sound, architecture="transformers")

    @pytest.mark.parametrize(
        ("options", "error", "words"),
        [
            ({"dtype": "float32"}, ConfigError, "packed in bfloat16"),
            ({"quantization": "int8"}, ConfigError, "packed with plain weights"),
            ({"device": torch.device("cuda")}, UnsupportedModelError, "packed for the CPU"),
        ],
    )
    def test_another_way_than_it_was_packed(self, sound, options, error, words):
        with pytest.raises(error, match=words):
            load(sound, **options)

    def test_a_comparison_with_hugging_face(self, sound):
        with pytest.raises(UnsupportedModelError, match="is packed, which Hugging Face"):
            compare(sound)

    def test_the_way_it_was_packed_may_be_said(self, sound):
        assert load(sound, dtype="bfloat16").dtype == torch.bfloat16

    def test_another_version(self, folder):
        edit_json(
            folder / "config.json", {SETTINGS: {"version": 9, "dtype": "", "quantization": 0}}
        )
        with pytest.raises(UnsupportedModelError, match=r"version 9.*reads 1: pack"):
            load(folder)

    def test_settings_that_are_gone(self, folder):
        edit_json(folder / "config.json", {SETTINGS: None})
        with pytest.raises(CheckpointError, match="pack it again"):
            load(folder)


class TestUnsoundFiles:
    def check(self, folder, change, words):
        rewrite(folder, change)
        with pytest.raises(CheckpointError, match=words):
            load(folder)

    def test_tensors_that_are_missing_or_left_over(self, folder):
        def change(tensors, matrices):
            tensors["model.extra.weight"] = tensors.pop("model.norm.weight")

        self.check(
            folder, change, r"(?s)missing: model\.norm\.weight.*not used.*: model\.extra\.weight"
        )

    def test_a_matrix_of_another_size(self, folder):
        def change(tensors, matrices):
            matrices["lm_head"]["rows"] -= 32
            tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1].contiguous()

        self.check(folder, change, r"of the wrong shape or kind: lm_head\.weight")

    def test_panels_of_another_size(self, folder):
        def change(tensors, matrices):
            tensors["lm_head.weight"] = tensors["lm_head.weight"].repeat(2, 1, 1, 1)

        self.check(folder, change, r"wrong shape or kind: lm_head\.weight.*expected shape")

    def test_a_matrix_of_another_dtype(self, folder):
        def change(tensors, matrices):
            tensors["lm_head.weight"] = tensors["lm_head.weight"].half()

        self.check(folder, change, r"expected panels of torch\.bfloat16")

    def test_a_vector_of_another_dtype(self, folder):
        def change(tensors, matrices):
            tensors["model.norm.weight"] = tensors["model.norm.weight"].half()

        self.check(folder, change, r"model\.norm\.weight \(torch\.float16")

    def test_metadata_that_are_gone(self, folder):
        def change(tensors, matrices):
            matrices["lm_head"] = {"bits": 3}

        self.check(folder, change, "does not say what its matrices are")

    def test_a_matrix_that_is_smaller_than_it_says(self, folder):
        """Sizes in config.json are compared with this before anything is built by them."""

        def change(tensors, matrices):
            matrices["lm_head"]["rows"] = 1 << 30

        self.check(folder, change, r"'lm_head.weight' is too small for \[1073741824, 64\]")

    def test_an_order_that_is_none(self, tmp_path):
        """It would be read as places in memory."""
        made = pack(make_shuffled_gptq(tmp_path / "plain"), tmp_path / "packed")

        def change(tensors, matrices):
            name = next(name for name in tensors if name.endswith(".order"))
            tensors[name][0] = 1 << 40

        self.check(made, change, "is no permutation")

    def test_strange_headers_give_errors_that_help(self, folder):
        """Whatever a stranger writes into the metadata: loaded, or one of sglite's errors."""
        source = random.Random(0)
        strange = [None, -1, 0, 7, 1 << 70, "x", "float64", [], {}, 1.5, True]
        refused = 0
        contents = packed_file(folder).read_bytes()
        for _ in range(60):

            def change(tensors, matrices):
                fields = matrices[source.choice(list(matrices))]
                fields[source.choice(list(fields))] = source.choice(strange)

            packed_file(folder).unlink()
            packed_file(folder).write_bytes(contents)
            rewrite(folder, change)
            try:
                load(folder)
            except SGLiteError:
                refused += 1
        assert refused > 30


def test_room_for_the_cache_leaves_room_for_mapped_weights(sound, monkeypatch):
    """The system counts pages of a file as free, though they are what the model is made of."""
    monkeypatch.setattr("sglite.engine.memory._machine_available", lambda: 1 << 30)
    with LLM(sound) as llm:
        tokens = llm.config.kv_cache_tokens
        mapped = packed_file(sound).stat().st_size
        monkeypatch.setattr("sglite.engine.memory._machine_available", lambda: (1 << 30) - mapped)
    with LLM(sound) as llm:
        assert llm.config.kv_cache_tokens < tokens


def test_the_command_line(original, tmp_path):
    done = run("pack", str(original), str(tmp_path / "packed"), "--quantization", "int8")
    assert "is ready" in done.stdout
    with LLM(tmp_path / "packed") as llm:
        assert llm.config.quantization == "int8"
        assert llm.generate([5, 6, 7], max_new_tokens=2).usage.completion_tokens == 2
