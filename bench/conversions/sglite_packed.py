"""Our own packed checkpoints, as `python -m sglite pack` writes them."""

from pathlib import Path

from bench.conversions import main
from sglite import pack


def convert(folder: Path, output: Path, dtype: str, quantization: str | None) -> None:
    """Writes the folder `output`."""
    pack(folder, output, dtype=dtype, quantization=quantization)


if __name__ == "__main__":
    main(convert)
