"""From what the caller calls a model to a folder with config, tokenizer and weights."""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from sglite.interface.errors import CheckpointError, UnsupportedModelError
from sglite.interface.files import read_json
from sglite.models.hub import download_checkpoint, download_tokenizer
from sglite.models.safetensors_file import (
    INDEX_FILE,
    PACKED_FILE,
    WEIGHT_FILE,
    no_weights,
    read_index,
)

_SHIPPED = Path(__file__).parent.parent / "checkpoints"
_SHIPPED_NAMES = ("demo", "demo-vl")  # a language model; one that takes pictures as well
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
_GENERIC_TOKENIZERS = ("PreTrainedTokenizerFast", "TokenizersBackend")
_OTHER_TOKENIZER = "tokenizer="  # begins errors about one that is not the checkpoint's
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk.

    Attributes:
        name: what the caller called it.
        folder: where its files are.
        config: the contents of `config.json`.
        generation_config: the contents of `generation_config.json`; None if there is none.
        weight_files: the safetensors files that hold the weights.
    """

    name: str
    folder: Path
    config: Mapping[str, Any]
    generation_config: Mapping[str, Any] | None
    weight_files: tuple[Path, ...]

    @property
    def is_packed(self) -> bool:
        """Whether `sglite.pack` wrote it."""
        return self.weight_files[0].name == PACKED_FILE


def resolve_checkpoint(
    model: str | os.PathLike[str],
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
) -> Checkpoint:
    """Finds a model's files; downloads them if they are on the hub and not here yet.

    Args:
        model: a folder, a hub id, or "demo" or "demo-vl" (small models that ship with the
            library; a folder of that name is "./demo"). A folder that exists is never looked for
            on the hub.
        revision, cache_dir, token: for hub models, as huggingface_hub takes them.

    Raises:
        CheckpointError: nothing is there, a file is missing or cannot be read, or the weights are
            of a kind that is not loaded.
    """
    if not isinstance(model, str | os.PathLike):
        raise UnsupportedModelError(
            f"{type(model).__name__} is no torch.nn.Module: pass a folder, a hub id or a live "
            f"Hugging Face module"
        )
    name = os.fspath(model)
    folder = _find_folder(name, is_path=isinstance(model, os.PathLike))
    if folder is None:
        folder = download_checkpoint(name, revision=revision, cache_dir=cache_dir, token=token)
    config = read_json(folder / "config.json")
    if config is None:
        raise CheckpointError(f"no config.json in {folder}")
    return Checkpoint(
        name,
        folder,
        config,
        read_json(folder / "generation_config.json"),
        _find_weight_files(folder),
    )


@contextmanager
def errors_name_files(checkpoint: Checkpoint) -> Iterator[None]:
    """Has errors about a checkpoint say which one, where they were raised without knowing."""
    try:
        yield
    except CheckpointError as error:
        message, folder = str(error), checkpoint.folder
        if re.match(r"\w*config\.json: ", message):
            error.args = (f"{folder}/{message}",)
        elif isinstance(error, UnsupportedModelError) and str(folder) not in message:
            error.args = (f"{folder}: {message}",)
        elif str(folder) not in message and not message.startswith(_OTHER_TOKENIZER):
            error.args = (f"{folder / 'config.json'}: {message}",)
        raise


def has_tokenizer(checkpoint: Checkpoint) -> bool:
    """Whether a tokenizer lies beside the weights."""
    return any((checkpoint.folder / name).exists() for name in _TOKENIZER_FILES)


def tokenizer_bytes(checkpoint: Checkpoint) -> int:
    """The size of the tokenizer's files beside the weights."""
    paths = [checkpoint.folder / name for name in _TOKENIZER_FILES]
    return sum(path.stat().st_size for path in paths if path.exists())


def load_tokenizer(
    checkpoint: Checkpoint,
    tokenizer: Any = None,
    *,
    trust_remote_code: bool = False,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
) -> Any:
    """The Hugging Face tokenizer of a checkpoint.

    Args:
        checkpoint: where it is, unless `tokenizer` says otherwise.
        tokenizer: a folder, a hub id, or a tokenizer, which is returned as it is.
        trust_remote_code: whether a tokenizer's own Python code may run.
        cache_dir, token: for a hub id, as huggingface_hub takes them.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    if tokenizer is None:
        folder = checkpoint.folder
        if not has_tokenizer(checkpoint):
            raise CheckpointError(
                f"no tokenizer in {folder} (looked for {', '.join(_TOKENIZER_FILES)}); pass "
                f"tokenizer= with a folder, a hub id or a tokenizer"
            )
    elif isinstance(tokenizer, str | os.PathLike):
        name = os.fspath(tokenizer)
        folder = _find_folder(name, is_path=isinstance(tokenizer, os.PathLike))
        if folder is None:
            try:
                folder = download_tokenizer(name, cache_dir=cache_dir, token=token)
            except CheckpointError as error:
                error.args = (f"{_OTHER_TOKENIZER}{name!r}: {error}",)
                raise
    else:
        return tokenizer
    _check_tokenizer_files(folder)
    try:
        found = _read_tokenizer(folder, trust_remote_code)
        found.encode("x")  # a setting of the wrong kind shows only when it is used
        return found
    except BaseException as error:  # whatever its code raises on a broken file, and Rust's panics
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise CheckpointError(f"the tokenizer in {folder} cannot be read: {error!r}") from error


def _read_tokenizer(folder: Path, trust_remote_code: bool) -> Any:
    if _is_generic_tokenizer(folder):
        return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(
        folder, local_files_only=True, trust_remote_code=trust_remote_code
    )


def _check_tokenizer_files(folder: Path) -> None:
    """Refuses a tokenizer that would be read from elsewhere, or forever.

    transformers joins the names that it finds here to the folder, whatever they are.
    """
    for path in folder.iterdir():
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise CheckpointError(f"{path} is no regular file")
    settings = read_json(folder / "tokenizer_config.json") or {}
    for key in ("fast_tokenizer_files", "gguf_file"):
        names = settings.get(key) or []
        for name in names if isinstance(names, list) else [names]:
            if not isinstance(name, str) or name != os.path.basename(name):
                raise CheckpointError(
                    f"{folder / 'tokenizer_config.json'}: {key} names {name!r}, which is no file "
                    f"of the same folder"
                )


def _is_generic_tokenizer(folder: Path) -> bool:
    """Whether `tokenizer.json` says it all, so that no class has to be looked for.

    AutoTokenizer would come to the same class, but imports the model's config first, which takes
    over a second.
    """
    settings = read_json(folder / "tokenizer_config.json") or {}
    named = settings.get("tokenizer_class")
    return named in _GENERIC_TOKENIZERS and (folder / "tokenizer.json").exists()


def _find_folder(name: str, *, is_path: bool) -> Path | None:
    """The local folder that `name` means; None where it can only be a hub id."""
    if name in _SHIPPED_NAMES and not is_path:
        return _SHIPPED / name
    path = Path(name).expanduser()
    # Not `Path.is_dir`, which raises OSError for a name that is too long to be one.
    if os.path.isdir(path):
        return path
    if os.path.exists(path):
        raise CheckpointError(
            f"{name} is a file; a model is a folder with config.json, a tokenizer and safetensors "
            f"files"
        )
    if is_path or not _HUB_ID.fullmatch(name) or name.startswith("."):
        raise CheckpointError(f"there is no folder {name}")
    return None


def _find_weight_files(folder: Path) -> tuple[Path, ...]:
    if (folder / PACKED_FILE).exists():
        return (folder / PACKED_FILE,)
    if (folder / INDEX_FILE).exists():
        files = [folder / name for name in sorted(read_index(folder / INDEX_FILE))]
        missing = [file.name for file in files if not file.exists()]
        if missing:
            raise CheckpointError(
                f"{folder / INDEX_FILE} names files that are not there: {', '.join(missing[:5])}"
                + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
            )
        return tuple(files)
    if (folder / WEIGHT_FILE).exists():
        return (folder / WEIGHT_FILE,)
    # "consolidated" files are a second copy under the names of the model's own library.
    files = sorted(
        file for file in folder.glob("*.safetensors") if not file.name.startswith("consolidated")
    )
    if not files:
        raise no_weights(str(folder), [file.name for file in folder.iterdir()])
    return tuple(files)
