"""Writing a checkpoint whose weights lie as the kernels of the CPU read them."""

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sglite.interface.errors import ConfigError, UnsupportedModelError
from sglite.interface.files import read_json
from sglite.models.checkpoint import Checkpoint
from sglite.models.loaded_model import LoadedModel
from sglite.models.loader import find_class
from sglite.models.packed_checkpoint import SETTINGS, PackedSettings, packed_tensors
from sglite.models.safetensors_file import DTYPE_NAMES, PACKED_FILE

# What a folder may hold beside config, tokenizer and processors: weights, in whatever form.
_WEIGHTS = (".safetensors", ".index.json", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".onnx")
# The one folder in a checkpoint that is no second set of weights.
_TEMPLATES = "additional_chat_templates"
_CACHE_LINE = 64
_TOKENIZER_SETTINGS = "tokenizer_config.json"
# Read only where the settings do not list the added tokens.
_OLD_TOKENIZER_FILES = ("special_tokens_map.json", "added_tokens.json")


def check_can_be_packed(checkpoint: Checkpoint, architecture: str | None, folder: Path) -> None:
    """Refuses what `write_packed` could not write or nobody could read, before weights are read.

    Raises:
        ConfigError: something is in `folder` already.
        UnsupportedModelError: the checkpoint is packed already, or runs by Hugging Face's class.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is there already: pass a new folder for the packed checkpoint")
    if checkpoint.is_packed:
        raise UnsupportedModelError(f"{checkpoint.folder} is packed already")
    names, _, is_native = find_class(checkpoint, architecture)
    if not is_native:
        raise UnsupportedModelError(
            f"{' or '.join(names)} runs by Hugging Face's class, whose weights are not packed; "
            f"`sglite.ModelRegistry.models` lists the architectures that are"
        )


def write_packed(
    checkpoint: Checkpoint, loaded: LoadedModel, architecture: str | None, folder: Path
) -> None:
    """Writes the packed checkpoint of a model that was loaded, all of it or nothing.

    Args:
        checkpoint: whose config, tokenizer and so on are copied.
        loaded: its model, on the CPU.
        architecture: to be named in the new `config.json`; None: as the checkpoint has it.
        folder: to be made.
    """
    config = dict(checkpoint.config)
    if architecture is not None:
        config["architectures"] = [architecture]
    dtype = str(loaded.dtype).removeprefix("torch.")
    config[SETTINGS] = asdict(PackedSettings(dtype, loaded.quantization))
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as unfinished:
        made = Path(unfinished) / folder.name
        shutil.copytree(checkpoint.folder, made, ignore=_ignored(checkpoint.folder))
        _rewrite(made / "config.json", config)
        _list_added_tokens(made)
        write_aligned(made / PACKED_FILE, *packed_tensors(loaded.model))
        os.replace(made, folder)


def write_aligned(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file in which tensors of whole cache lines begin at one.

    The format's own library sorts tensors by dtype, and puts the first of them anywhere.

    Args:
        path: the file, written anew.
        tensors: on the CPU, contiguous.
        metadata: for the header.
    """
    ordered = sorted(tensors.items(), key=lambda item: item[1].nbytes % _CACHE_LINE > 0)
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    position = 0
    for name, tensor in ordered:
        stop = position + tensor.nbytes
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, stop],
        }
        position = stop
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % _CACHE_LINE)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for _, tensor in ordered:
            file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy())


def _rewrite(path: Path, contents: Mapping[str, Any]) -> None:
    path.unlink()  # what was copied may be a link, or not be writable
    path.write_text(json.dumps(contents, indent=2) + "\n")


def _list_added_tokens(folder: Path) -> None:
    """Has the tokenizer's settings list the added tokens, as the files of older releases do.

    Where they do not, transformers parses the whole of `tokenizer.json` a second time, for these.
    """
    settings = read_json(folder / _TOKENIZER_SETTINGS)
    if settings is None or "added_tokens_decoder" in settings:
        return
    if any((folder / name).exists() for name in _OLD_TOKENIZER_FILES):
        return
    added = (read_json(folder / "tokenizer.json") or {}).get("added_tokens")
    if not isinstance(added, list) or not all(isinstance(t, dict) and "id" in t for t in added):
        return  # reading it says what is wrong
    listed = [dict(token) for token in added]
    settings["added_tokens_decoder"] = {str(token.pop("id")): token for token in listed}
    _rewrite(folder / _TOKENIZER_SETTINGS, settings)


def _ignored(folder: Path):
    def choose(here: str, names: list[str]) -> list[str]:
        return [
            name
            for name in names
            if name.endswith(_WEIGHTS)
            or name.startswith(".")
            or (Path(here) == folder and (folder / name).is_dir() and name != _TEMPLATES)
        ]

    return choose
