"""Checkpoints in the formats of engines that do not read safetensors: one file for each engine.

`python -m bench.conversions.NAME FOLDER OUTPUT --dtype bfloat16 --quantization int8`, with the
interpreter of the engine's environment.
"""

import argparse
from collections.abc import Callable
from pathlib import Path


def main(convert: Callable[[Path, Path, str, str | None], None]) -> None:
    """Reads the command line and converts.

    Args:
        convert: called with the folder of the checkpoint, the folder to make, the dtype of the
            weights and how they are quantized (None: not at all).
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--quantization")
    options = parser.parse_args()
    convert(options.folder, options.output, options.dtype, options.quantization)
