"""Reading a safetensors file tensor by tensor.

The format: 8 bytes with the header's length (little endian), the header (JSON: name to dtype, shape
and byte range), the data. The file is mapped, and the pages of a tensor are given back once it has
been used, so that a checkpoint never stands in memory twice. Nothing that the header says is
believed before it has been compared with the size of the file.
"""

import json
import math
import mmap
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sglite import ops
from sglite.interface.errors import CheckpointError

#: The file that says which tensor is in which of several weight files.
INDEX_FILE = "model.safetensors.index.json"
#: The weights, where they are one file.
WEIGHT_FILE = "model.safetensors"
#: The weights, where `sglite.pack` has written them.
PACKED_FILE = "packed.safetensors"

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
#: The format's names of dtypes.
DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_LONGEST_HEADER = 100_000_000  # as the format's own library has it
_MOST_DIMENSIONS = 64  # torch's limit


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """What a header says of a tensor.

    Attributes:
        name: its name.
        dtype_name: as in the file ("BF16").
        shape: its shape.
        start: first byte, from the beginning of the file.
        stop: behind the last byte.
    """

    name: str
    dtype_name: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def dtype(self) -> torch.dtype | None:
        """Torch's dtype; None where it has none."""
        return _DTYPES.get(self.dtype_name)


class SafetensorsFile:
    """A safetensors file, open for reading. Use it in a `with` block.

    Attributes:
        path: the file.
        entries: name to entry, in the order of the data.
        metadata: what else the header says, by names of its writer's choice.

    Raises:
        CheckpointError: the file cannot be opened, is cut short, or its header is no sound one; the
            message names the file.
    """

    def __init__(self, path: Path):
        self.path = path
        if path.exists() and not path.is_file():  # it might be read forever
            raise CheckpointError(f"{path} is no regular file")
        try:
            with path.open("rb") as file:
                size = file.seek(0, 2)
                file.seek(0)
                header, data_start = self._read_header(file, size)
                self.metadata = self._read_metadata(header)
                self.entries = self._read_entries(header, data_start, size)
                # Private and writable, since torch takes no read-only memory; nothing is written.
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
                self._is_kept = False
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error

    def __enter__(self) -> "SafetensorsFile":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Unmaps the file, unless it is kept. Tensors that it gave out must be gone."""
        if not self._is_kept:
            self._map.close()

    def keep_mapped(self) -> None:
        """Has the mapping live as long as any tensor that was read, whatever is closed.

        Its pages begin to be mapped, since all will be read.
        """
        self._is_kept = True
        ops.map_pages(torch.frombuffer(self._map, dtype=torch.uint8))

    def read(self, entry: TensorEntry) -> Tensor:
        """The tensor, over the mapped file: no copy, and valid until `release` or `close`.

        A copy where `is_mapped` says so, whose pages of the file are given back already.
        """
        dtype = entry.dtype
        count = math.prod(entry.shape)
        if not count:
            return torch.empty(entry.shape, dtype=dtype)
        if not self.is_mapped(entry):
            # Pages of its own, which go with the tensor: malloc would keep many of them.
            copy = mmap.mmap(-1, entry.stop - entry.start)
            with memoryview(self._map) as contents:
                copy[:] = contents[entry.start : entry.stop]
            self.release(entry)
            return torch.frombuffer(copy, dtype=dtype, count=count).view(entry.shape)
        flat = torch.frombuffer(self._map, dtype=dtype, count=count, offset=entry.start)
        return flat.view(entry.shape)

    def is_mapped(self, entry: TensorEntry) -> bool:
        """Whether `read` gives the mapped file; a copy where the data lies at an odd place."""
        return entry.start % entry.dtype.itemsize == 0

    def pieces(self, entry: TensorEntry, count: int) -> Iterator[Tensor]:
        """The tensor's elements, flat, `count` at a time; each piece is valid until the next."""
        size = entry.dtype.itemsize
        for start in range(entry.start, entry.stop, count * size):
            stop = min(start + count * size, entry.stop)
            piece = replace(entry, shape=((stop - start) // size,), start=start, stop=stop)
            yield self.read(piece)
            self.release(piece)

    def release(self, entry: TensorEntry) -> None:
        """Gives back the memory of the pages that belong to a tensor alone."""
        start = -(-entry.start // mmap.PAGESIZE) * mmap.PAGESIZE
        stop = entry.stop // mmap.PAGESIZE * mmap.PAGESIZE
        if stop > start and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED, start, stop - start)

    def _read_header(self, file: Any, size: int) -> tuple[dict, int]:
        length_bytes = file.read(8)
        length = int.from_bytes(length_bytes, "little")
        if len(length_bytes) < 8 or length > min(size - 8, _LONGEST_HEADER):
            raise CheckpointError(
                f"{self.path} is no safetensors file, or cut short: its first 8 bytes announce a "
                f"header of {length} bytes, and the file has {size}"
            )
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{self.path}: the header is no JSON: {error}") from error
        if not isinstance(header, dict):
            raise CheckpointError(f"{self.path}: the header is no JSON object")
        return header, 8 + length

    def _read_metadata(self, header: dict) -> dict[str, str]:
        metadata = header.pop("__metadata__", None)
        if not isinstance(metadata, dict):
            return {}
        return {name: text for name, text in metadata.items() if isinstance(text, str)}

    def _read_entries(self, header: dict, data_start: int, size: int) -> dict[str, TensorEntry]:
        entries = [self._entry(name, fields, data_start) for name, fields in header.items()]
        entries.sort(key=lambda entry: (entry.start, entry.stop))
        previous_stop = data_start
        for entry in entries:
            if entry.stop > size:
                raise CheckpointError(
                    f"{self.path} is cut short: tensor {entry.name!r} ends at byte {entry.stop}, "
                    f"and the file has {size}"
                )
            if entry.start < previous_stop:
                raise CheckpointError(
                    f"{self.path}: tensor {entry.name!r} overlaps the one before it"
                )
            previous_stop = entry.stop
        return {entry.name: entry for entry in entries}

    def _entry(self, name: str, fields: Any, data_start: int) -> TensorEntry:
        try:
            dtype_name, shape, (start, stop) = (
                fields["dtype"],
                tuple(fields["shape"]),
                fields["data_offsets"],
            )
        except (TypeError, KeyError, ValueError) as error:
            raise self._bad_entry(name, fields) from error
        if (
            not isinstance(dtype_name, str)
            or len(shape) > _MOST_DIMENSIONS
            or not all(
                type(number) is int and 0 <= number < 1 << 62 for number in (*shape, start, stop)
            )
        ):
            raise self._bad_entry(name, fields)
        entry = TensorEntry(name, dtype_name, shape, data_start + start, data_start + stop)
        if entry.dtype and stop - start != math.prod(shape) * entry.dtype.itemsize:
            raise CheckpointError(
                f"{self.path}: tensor {name!r} of {dtype_name}{list(shape)} needs "
                f"{math.prod(shape) * entry.dtype.itemsize} bytes; the header gives it "
                f"{stop - start}"
            )
        return entry

    def _bad_entry(self, name: str, fields: Any) -> CheckpointError:
        return CheckpointError(
            f"{self.path}: the header's entry of tensor {name!r} is unsound: {str(fields)[:200]}"
        )


def no_weights(place: str, files: Iterable[str]) -> CheckpointError:
    """The error for a folder or hub model without safetensors, by what is there instead.

    Args:
        place: the folder or the hub id.
        files: names of the files in it.
    """
    files = sorted(files)
    pickles = [name for name in files if name.endswith(_PICKLES)]
    if pickles:
        return CheckpointError(
            f"the weights in {place} are pickles ({pickles[0]}), which may run code when they are "
            f"read, and are not loaded; convert them to safetensors once, in an environment you "
            f"trust: transformers.AutoModelForCausalLM.from_pretrained({place!r})"
            f".save_pretrained(NEW_FOLDER)"
        )
    if any(name.endswith(".gguf") for name in files):
        return CheckpointError(
            f"the weights in {place} are GGUF files, which are not read; expected safetensors"
        )
    return CheckpointError(
        f"no weights in {place}: expected {WEIGHT_FILE} or {INDEX_FILE} and its files"
    )


def read_index(path: Path) -> set[str]:
    """The names of the files that an index of weights lists, all in its own folder.

    Raises:
        CheckpointError: it is no sound index.
    """
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        names = set(weight_map.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is no index of safetensors files: {error!r}") from error
    for name in names:
        is_plain = isinstance(name, str) and re.fullmatch(r"[\w.-]+\.safetensors", name)
        if not is_plain:
            raise CheckpointError(
                f"{path}: {name!r} is not the name of a safetensors file in the same folder"
            )
    if not names:
        raise CheckpointError(f"{path}: weight_map is empty")
    return names
