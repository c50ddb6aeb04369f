"""Packing a checkpoint once, so that every start afterwards only maps it."""

import os
from pathlib import Path

from sglite.models.checkpoint import errors_name_files, resolve_checkpoint
from sglite.models.loader import load_model
from sglite.models.packing import check_can_be_packed, write_packed


def pack(
    model: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    dtype: str = "auto",
    quantization: str | None = None,
    architecture: str | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
) -> Path:
    """Writes a checkpoint that starts at once on a CPU, whatever its size.

    `LLM(folder)` then maps the weights where they lie, packed and maybe quantised already, instead
    of reading and packing them: results are the same, bit for bit. Processes that run the same
    folder share its memory. The new folder takes the place of the old one for sglite on the CPU
    only; keep the original for everything else.

    Args:
        model: a folder, a hub id, "demo" or "demo-vl".
        folder: to be made; it must not exist, or be empty.
        dtype, quantization, architecture, trust_remote_code, revision, cache_dir, token: as for
            `LLM`.

    Returns:
        The new folder.

    Raises:
        CheckpointError: the checkpoint is not sound.
        ConfigError: the folder is there already, or an argument contradicts the checkpoint.
        UnsupportedModelError: the model runs by Hugging Face's class, or is packed already.
    """
    target = Path(folder).expanduser().absolute()
    checkpoint = resolve_checkpoint(model, revision=revision, cache_dir=cache_dir, token=token)
    with errors_name_files(checkpoint):
        check_can_be_packed(checkpoint, architecture, target)
        loaded = load_model(
            checkpoint,
            architecture=architecture,
            dtype=dtype,
            quantization=quantization,
            trust_remote_code=trust_remote_code,
        )
        write_packed(checkpoint, loaded, architecture, target)
    return target
