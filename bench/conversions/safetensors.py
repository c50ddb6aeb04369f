"""Reads a checkpoint's safetensors files with numpy alone, which has no bfloat16."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

_DTYPES = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32}


def read_tensors(folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    """All tensors of a checkpoint with their names, mapped from the files.

    bfloat16 comes as its bits, uint16; float16 and float32 as they are.

    Raises:
        ValueError: a tensor has another dtype.
    """
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as opened:
            size = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(size))
        header.pop("__metadata__", None)
        data = np.memmap(file, np.uint8, "r", offset=8 + size)
        for name, tensor in header.items():
            if tensor["dtype"] not in _DTYPES:
                raise ValueError(f"{name} is {tensor['dtype']}, not one of {', '.join(_DTYPES)}")
            begin, end = tensor["data_offsets"]
            yield name, data[begin:end].view(_DTYPES[tensor["dtype"]]).reshape(tensor["shape"])


def to_float32(tensor: np.ndarray) -> np.ndarray:
    """The numbers of a tensor from `read_tensors`, float32, exact."""
    if tensor.dtype == np.uint16:
        return (tensor.astype(np.uint32) << 16).view(np.float32)
    return tensor.astype(np.float32)
