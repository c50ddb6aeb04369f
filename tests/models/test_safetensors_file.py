"""Reading safetensors: against the format's own library, and what unsound files get."""

import json
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from sglite import CheckpointError
from sglite.models.safetensors_file import SafetensorsFile, read_index

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).view(2, 3),
    "b": torch.randn(7, 33).bfloat16(),
    "c": torch.randn(4096, 9).half(),
    "scalar": torch.tensor(2.5),
    "empty": torch.empty(0, 4),
    "ids": torch.arange(3),
    "eighth": torch.randn(4, 4).to(torch.float8_e4m3fn),
}


def raw(header, data=b""):
    """A file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_reads_what_the_formats_library_wrote(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path, metadata={"format": "pt"})
    with SafetensorsFile(path) as file:
        assert set(file.entries) == set(TENSORS)
        for _ in range(2):  # what was released can be read again
            for name, tensor in TENSORS.items():
                found = file.read(file.entries[name])
                assert found.dtype == tensor.dtype
                assert found.shape == tensor.shape
                assert torch.equal(found.double(), tensor.double())
                del found
                file.release(file.entries[name])


def test_data_that_lies_at_odd_places(tmp_path):
    path = tmp_path / "odd.safetensors"
    values = torch.tensor([1.5, -2.0])
    text = json.dumps({"x": entry()}).encode()
    text += b" " * (3 - (8 + len(text)) % 4)  # the data begins at 3 modulo 4
    path.write_bytes(raw(text, values.numpy().tobytes()))
    with SafetensorsFile(path) as file:
        assert torch.equal(file.read(file.entries["x"]), values)


@pytest.mark.parametrize("shift", [0, 1, 3])
def test_pieces_are_the_tensor(tmp_path, shift):
    path = tmp_path / "model.safetensors"
    contents = save(TENSORS)
    length = int.from_bytes(contents[:8], "little")
    header = contents[8 : 8 + length] + b" " * shift
    path.write_bytes(raw(header, contents[8 + length :]))
    with SafetensorsFile(path) as file:
        for name, tensor in TENSORS.items():
            for count in (1 << 20, 1000, 7):
                pieces = [piece.clone() for piece in file.pieces(file.entries[name], count)]
                assert all(len(piece) == count for piece in pieces[:-1])
                found = torch.cat(pieces) if pieces else torch.empty(0)
                assert torch.equal(found.double(), tensor.flatten().double()), name


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (b"", "is no safetensors file, or cut short"),
        (b"abc", "is no safetensors file, or cut short"),
        (b"\xff" * 64, "is no safetensors file, or cut short"),
        (b"PK\x03\x04" + b"\0" * 60, "is no safetensors file, or cut short|no JSON"),
        (raw(b"not json"), "the header is no JSON"),
        (raw(b"\xff\xfe"), "the header is no JSON"),
        (raw(b"[" * 100_000), "the header is no JSON"),
        (raw([1, 2]), "the header is no JSON object"),
        (raw({"x": 3}), "entry of tensor 'x' is unsound"),
        (raw({"x": {"dtype": "F32"}}), "entry of tensor 'x' is unsound"),
        (raw({"x": entry(shape=(-2,))}, b"\0" * 8), "entry of tensor 'x' is unsound"),
        (raw({"x": entry(shape=(2.0,))}, b"\0" * 8), "entry of tensor 'x' is unsound"),
        (raw({"x": entry(dtype=7)}, b"\0" * 8), "entry of tensor 'x' is unsound"),
        (raw({"x": entry(offsets=(0, 8, 9))}, b"\0" * 8), "entry of tensor 'x' is unsound"),
        (raw({"x": entry(shape=(3,))}, b"\0" * 8), r"F32\[3\] needs 12 bytes; .* gives it 8"),
        (raw({"x": entry(shape=(2**62, 2**62))}, b"\0" * 8), "entry of tensor 'x' is unsound"),
        (raw({"x": entry()}, b"\0" * 7), "is cut short: tensor 'x' ends at byte"),
        (raw({"x": entry(), "y": entry(offsets=(4, 12))}, b"\0" * 12), "'y' overlaps the one"),
    ],
)
def test_unsound_files_are_refused_by_name(tmp_path, contents, message):
    path = tmp_path / "model.safetensors"
    path.write_bytes(contents)
    with pytest.raises(CheckpointError, match=message) as caught:
        SafetensorsFile(path)
    assert str(path) in str(caught.value)


def test_a_file_that_is_none(tmp_path):
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(CheckpointError, match="cannot be read|is no regular file"):
            SafetensorsFile(path)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_mutated_files_give_a_clear_error_or_their_tensors(tmp_path_factory, data):
    sound = save({name: TENSORS[name] for name in ("a", "b", "ids")})
    mutated = bytearray(sound)
    for _ in range(data.draw(st.integers(1, 4))):
        kind = data.draw(st.sampled_from(["set", "cut", "insert"]))
        at = data.draw(st.integers(0, min(len(mutated) - 1, 400)))
        if kind == "set":
            mutated[at] = data.draw(st.integers(0, 255))
        elif kind == "cut":
            del mutated[at : at + data.draw(st.integers(1, 40))]
        else:
            mutated[at:at] = data.draw(st.binary(max_size=8))
        if not mutated:
            return
    path = tmp_path_factory.getbasetemp() / "mutated.safetensors"
    path.write_bytes(bytes(mutated))
    try:
        file = SafetensorsFile(path)
    except CheckpointError:
        return
    with file:
        for name, found in file.entries.items():
            if found.dtype is not None:
                assert tuple(file.read(file.entries[name]).shape) == found.shape


class TestIndex:
    def write(self, path, contents):
        path = path / "model.safetensors.index.json"
        path.write_text(contents if isinstance(contents, str) else json.dumps(contents))
        return path

    def test_the_files_it_names(self, tmp_path):
        weight_map = {
            "a": "model-1.safetensors",
            "b": "model-2.safetensors",
            "c": "model-1.safetensors",
        }
        path = self.write(tmp_path, {"metadata": {}, "weight_map": weight_map})
        assert read_index(path) == {"model-1.safetensors", "model-2.safetensors"}

    @pytest.mark.parametrize(
        "contents", ["{", "[]", "{}", {"weight_map": []}, {"weight_map": None}]
    )
    def test_unsound(self, tmp_path, contents):
        path = self.write(tmp_path, contents)
        with pytest.raises(CheckpointError, match="is no index of safetensors files"):
            read_index(path)

    @pytest.mark.parametrize(
        "name", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "weights.bin", "", 3]
    )
    def test_only_files_of_the_same_folder(self, tmp_path, name):
        path = self.write(tmp_path, {"weight_map": {"a": name}})
        with pytest.raises(CheckpointError, match="is not the name of a safetensors file"):
            read_index(path)

    def test_an_empty_one(self, tmp_path):
        with pytest.raises(CheckpointError, match="weight_map is empty"):
            read_index(self.write(tmp_path, {"weight_map": {}}))
