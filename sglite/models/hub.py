"""Models of the Hugging Face hub: downloads the files that are needed, and no others."""

import os
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from sglite.interface.errors import CheckpointError
from sglite.models.safetensors_file import INDEX_FILE, WEIGHT_FILE, no_weights, read_index

# What says how pictures and videos become pixels, and where they stand in a prompt.
_PROCESSOR_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)
# Configuration, tokenizer and processor: everything but weights.
_SMALL_FILES = [
    "config.json",
    "generation_config.json",
    INDEX_FILE,
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.tiktoken",
    "chat_template*",
    "additional_chat_templates/*",
    *_PROCESSOR_FILES,
    "*.py",  # read only with trust_remote_code
]
_TOKENIZER_FILES = [name for name in _SMALL_FILES if name not in (INDEX_FILE, *_PROCESSOR_FILES)]


def download_checkpoint(
    repo_id: str,
    *,
    revision: str | None,
    cache_dir: str | os.PathLike[str] | None,
    token: str | bool | None,
) -> Path:
    """The folder of a hub model in the local cache, filled first where files are missing.

    Without a network, or with `HF_HUB_OFFLINE=1`, it is what the cache has.

    Args:
        repo_id: "owner/name".
        revision: branch, tag or commit; None: the main branch.
        cache_dir: the cache; None: Hugging Face's own.
        token: access token, or whether to send the one that is logged in.

    Raises:
        CheckpointError: there is no such model or revision, no access to it, no connection, or no
            weights in safetensors.
    """
    folder = _download(repo_id, _SMALL_FILES, revision, cache_dir, token)
    # The second download is pinned to what the first one found, whatever is pushed in between.
    commit = folder.name
    if (folder / INDEX_FILE).exists():
        weights = sorted(read_index(folder / INDEX_FILE))
    else:
        weights = [WEIGHT_FILE]
    if not all((folder / name).exists() for name in weights):
        _download(repo_id, weights, commit, cache_dir, token)
    if not any((folder / name).exists() for name in weights):
        raise no_weights(repo_id, _files_on_the_hub(repo_id, commit, token))
    return folder


def download_tokenizer(
    repo_id: str, *, cache_dir: str | os.PathLike[str] | None, token: str | bool | None
) -> Path:
    """As `download_checkpoint`, without the weights."""
    return _download(repo_id, _TOKENIZER_FILES, None, cache_dir, token)


def _files_on_the_hub(repo_id: str, commit: str, token: str | bool | None) -> list[str]:
    """Names of all files of a model; none where the hub cannot be asked."""
    try:
        return huggingface_hub.list_repo_files(repo_id, revision=commit, token=token)
    except OSError:  # all of the hub's errors are, and those of the network
        return []


def _download(repo_id, patterns, revision, cache_dir, token) -> Path:
    where = f"{repo_id!r}" + (f" (revision {revision!r})" if revision else "")
    try:
        return Path(
            huggingface_hub.snapshot_download(
                repo_id,
                revision=revision,
                cache_dir=cache_dir,
                token=token,
                allow_patterns=patterns,
            )
        )
    except HFValidationError as error:
        raise CheckpointError(f"{repo_id!r} is neither a folder nor a hub id: {error}") from error
    except GatedRepoError as error:
        raise CheckpointError(
            f"the hub model {where} is gated: accept its terms on huggingface.co, and log in or "
            f"pass token="
        ) from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{where} is neither a folder here nor a model on the hub that this account may see"
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"the hub model {where} has no such revision") from error
    except LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{where} is no folder here, and the hub cannot be reached, nor is the model complete "
            f"in the local cache: {error}"
        ) from error
    except OSError as error:
        raise CheckpointError(f"the hub model {where} cannot be downloaded: {error}") from error
