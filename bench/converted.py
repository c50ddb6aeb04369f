"""Where the checkpoints of engines lie that do not read safetensors, each made once and kept."""

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]
_CONVERSIONS = _ROOT / "bench" / "conversions"


class ConversionError(RuntimeError):
    """A checkpoint was not converted; the message holds what was said."""


def converted_folder(
    name: str,
    python: str,
    folder: Path,
    *,
    dtype: str,
    quantization: str | None,
    cache_folder: Path,
) -> Path:
    """The folder that an engine loads: `folder` itself, unless `bench/conversions/` has its name.

    Args:
        name: of the engine.
        python: its interpreter, which converts.
        folder: of the checkpoint.
        dtype: of the weights.
        quantization: of the weights; None: none.
        cache_folder: where what is converted is kept.

    Raises:
        ConversionError: it failed.
    """
    script = _CONVERSIONS / f"{name}.py"
    if not script.exists():
        return folder
    recipe = hashlib.sha256(script.read_bytes())
    for file in sorted(folder.iterdir()):
        status = file.stat()
        recipe.update(f"{file} {status.st_size} {status.st_mtime_ns}\n".encode())
    kind = quantization or dtype
    output = cache_folder / f"{folder.name}-{name}-{kind}-{recipe.hexdigest()[:10]}"
    if output.is_dir():
        return output
    unfinished = output.with_name(output.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    command = [python, "-m", f"bench.conversions.{name}", str(folder), str(unfinished)]
    command += ["--dtype", dtype]
    if quantization:
        command += ["--quantization", quantization]
    done = subprocess.run(
        command, cwd=_ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
    )
    if done.returncode:
        raise ConversionError(f"{name} does not convert {folder.name}:\n{done.stdout[-4000:]}")
    unfinished.rename(output)
    return output


def packed_folder(folder: Path, dtype: str, quantization: str | None, cache_folder: Path) -> Path:
    """What `sglite.pack` makes of a checkpoint, likewise.

    Args: as those of `converted_folder`.
    """
    return converted_folder(
        "sglite_packed",
        sys.executable,
        folder,
        dtype=dtype,
        quantization=quantization,
        cache_folder=cache_folder,
    )
