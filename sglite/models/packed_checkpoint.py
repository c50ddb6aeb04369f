"""Checkpoints whose weights lie in the file as the kernels of the CPU read them.

`sglite.pack` writes them: everything that a checkpoint's folder holds, with `PACKED_FILE` in place
of the weights. Loading maps that file, reads nothing before it is used and copies nothing, so that
a start takes no longer for a larger model, and processes with the same model share its memory.
(llama.cpp maps its files in the same way.)

The file is a safetensors file. A matrix is the tensor `PATH.weight` in panels (see
`sglite.ops.PackedWeight`), or, quantised, `PATH.weight.codes`, `.scales`, `.zeros` and `.order`
(`sglite.ops.QuantizedWeight`); every other parameter or buffer is a tensor of its own name. PATH is
a module's in our model, where stacked layers are one. The header's metadata say under `matrices`
what the shapes of panels do not; `config.json` says under `sglite_packed` what has to be known
before the file is opened.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from sglite.interface.errors import CheckpointError, ConfigError, UnsupportedModelError
from sglite.layers.weight import Weight, WeightModule
from sglite.models.checkpoint import Checkpoint
from sglite.models.safetensors_file import PACKED_FILE, SafetensorsFile, TensorEntry
from sglite.models.weights import refuse_misfits
from sglite.ops import PackedWeight, QuantizedLayout, QuantizedWeight

#: The key of `config.json`, and of the header's metadata.
SETTINGS, MATRICES = "sglite_packed", "matrices"
_VERSION = 1


@dataclass(frozen=True)
class PackedSettings:
    """What `config.json` says of packed weights.

    Attributes:
        dtype: what the model runs in.
        quantization: how its matrices are quantised, by the name of the method; None: they are not.
        version: of the format.
    """

    dtype: str
    quantization: str | None
    version: int = _VERSION


@dataclass(frozen=True)
class PackedMatrix:
    """What the metadata say of a matrix.

    Attributes:
        rows, columns: of the weight.
        bits, group_size, has_zeros, scale_dtype: of its `QuantizedLayout`; no bits: it has none.
    """

    rows: int
    columns: int
    bits: int | None = None
    group_size: int | None = None
    has_zeros: bool = False
    scale_dtype: str | None = None

    def __post_init__(self):
        counts = [self.rows, self.columns]
        if self.bits is not None:
            counts += [self.bits, self.group_size]
            if not isinstance(getattr(torch, str(self.scale_dtype), None), torch.dtype):
                raise ValueError(f"scale_dtype={self.scale_dtype!r} is no dtype")
        if not all(type(count) is int and 0 < count < 1 << 31 for count in counts):
            raise ValueError(f"{counts} are no counts")
        if self.layout is not None and (problem := self.layout.problem(self.columns)):
            raise ValueError(problem)

    @property
    def layout(self) -> QuantizedLayout | None:
        """How it is quantised; None: it is not."""
        if self.bits is None:
            return None
        return QuantizedLayout(
            self.bits, self.group_size, bool(self.has_zeros), getattr(torch, self.scale_dtype)
        )


def packed_settings(
    checkpoint: Checkpoint,
    *,
    dtype: str | torch.dtype,
    quantization: str | None,
    device: torch.device,
) -> PackedSettings | None:
    """What a packed checkpoint says of itself; None for any other.

    Args:
        checkpoint: either kind.
        dtype, quantization, device: what the caller of `LLM` asks for.

    Raises:
        CheckpointError: what it says is unsound.
        ConfigError: something else is asked for than was packed.
        UnsupportedModelError: it is of another version, or for another device.
    """
    if not checkpoint.is_packed:
        return None
    config = checkpoint.folder / "config.json"
    try:
        settings = PackedSettings(**checkpoint.config[SETTINGS])
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"{config}: {SETTINGS} does not say what is in {PACKED_FILE}; pack it again"
        ) from error
    if settings.version != _VERSION:
        raise UnsupportedModelError(
            f"{config}: {PACKED_FILE} is of version {settings.version!r}, and this release of "
            f"sglite reads {_VERSION}: pack the original checkpoint again"
        )
    if device.type != "cpu":
        raise UnsupportedModelError(
            f"{PACKED_FILE} is packed for the CPU: pass device='cpu', or the original checkpoint"
        )
    asked = str(dtype).removeprefix("torch.")
    if asked not in ("auto", settings.dtype):
        raise ConfigError(
            f"dtype={asked!r}: the checkpoint is packed in {settings.dtype}; leave dtype= out, or "
            f"pass the original checkpoint"
        )
    if quantization not in (None, settings.quantization):
        raise ConfigError(
            f"quantization={quantization!r}: the checkpoint is packed with "
            f"{settings.quantization or 'plain weights'}; leave quantization= out, or pass the "
            f"original checkpoint"
        )
    return settings


def matrices_of(file: SafetensorsFile) -> dict[str, PackedMatrix]:
    """What the metadata of a packed file say, by the module's path.

    Raises:
        CheckpointError: they are unsound.
    """
    try:
        described = json.loads(file.metadata[MATRICES])
        return {path: PackedMatrix(**fields) for path, fields in described.items()}
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{file.path}: the header does not say what its matrices are: {error!r}"
        ) from error


def entries_of(file: SafetensorsFile) -> dict[str, TensorEntry]:
    """The tensors of a packed file, a matrix with the shape of the weight that it holds.

    Raises:
        CheckpointError: it holds less than that.
    """
    entries = dict(file.entries)
    for path, matrix in matrices_of(file).items():
        name = f"{path}.weight" if matrix.bits is None else f"{path}.weight.codes"
        entry = entries.get(name)
        if entry is None or entry.dtype is None:
            continue  # `map_weights` says so
        bits = matrix.bits or 8 * entry.dtype.itemsize
        if 8 * (entry.stop - entry.start) < matrix.rows * matrix.columns * bits:
            raise CheckpointError(
                f"{file.path}: tensor {name!r} is too small for [{matrix.rows}, {matrix.columns}]"
            )
        entries[name] = replace(entry, shape=(matrix.rows, matrix.columns))
    return entries


def map_weights(model: nn.Module, file: SafetensorsFile, dtype: torch.dtype) -> int:
    """Has a model's matrices lie in a packed file; all else is copied.

    Args:
        model: nothing has been written into it.
        file: `keep_mapped`, so that it stays mapped as long as a matrix lives.
        dtype: what the model runs in.

    Returns:
        Bytes of the file that stay mapped.

    Raises:
        CheckpointError: tensors are missing, left over or misshapen; the message names them.
    """
    matrices, left = matrices_of(file), dict(file.entries)
    missing, misshapen = [], []
    num_bytes = 0

    def take(name: str) -> Tensor | None:
        nonlocal num_bytes
        entry = left.pop(name, None)
        if entry is None:
            return None
        if entry.dtype is None:
            raise CheckpointError(f"{file.path}: tensor {name!r} is of {entry.dtype_name}")
        num_bytes += entry.stop - entry.start
        return file.read(entry)

    for path, weight in _matrices(model):
        described = matrices.get(path)
        if described is None:
            missing.append(f"{path}.weight")
            continue
        try:
            weight.adopt(_stored(path, described, dtype, take))
        except ValueError as error:
            misshapen.append(f"{path}.weight ({error})")
    for name, tensor in _others(model):
        value = take(name)
        if value is None:
            missing.append(name)
        elif value.shape != tensor.shape or value.dtype != tensor.dtype:
            misshapen.append(
                f"{name} ({value.dtype}{list(value.shape)}, expected {tensor.dtype}"
                f"{list(tensor.shape)})"
            )
        else:
            tensor.detach().copy_(value)
    refuse_misfits(f"the tensors in {file.path}", missing, list(left), misshapen)
    return num_bytes


def packed_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What a packed file of a loaded model holds: its tensors, and its metadata."""
    tensors: dict[str, Tensor] = {}
    matrices: dict[str, dict[str, Any]] = {}
    for path, weight in _matrices(model):
        stored, name = weight.stored, f"{path}.weight"
        if isinstance(stored, QuantizedWeight):
            layout = stored.layout
            described = PackedMatrix(
                *stored.shape,
                layout.bits,
                layout.group_size,
                layout.has_zeros,
                str(layout.scale_dtype).removeprefix("torch."),
            )
            parts = {part: getattr(stored, part) for part in ("codes", "scales", "zeros", "order")}
            tensors |= {f"{name}.{part}": t for part, t in parts.items() if t is not None}
        else:
            described = PackedMatrix(*stored.shape)
            tensors[name] = stored.storage
        matrices[path] = asdict(described)
    tensors |= {name: tensor.detach() for name, tensor in _others(model)}
    return tensors, {MATRICES: json.dumps(matrices)}


def _stored(
    path: str, matrix: PackedMatrix, dtype: torch.dtype, take: Callable[[str], Tensor | None]
) -> PackedWeight | QuantizedWeight:
    """A weight over what `take` gives of the file by name; raises ValueError if that cannot be."""
    name, layout = f"{path}.weight", matrix.layout
    if layout is None:
        storage = take(name)
        if storage is None or storage.dtype != dtype:
            raise ValueError(f"expected panels of {dtype}")
        return PackedWeight(storage, matrix.rows, matrix.columns)
    codes, scales, zeros, order = (
        take(f"{name}.{part}") for part in ("codes", "scales", "zeros", "order")
    )
    if order is not None and not torch.equal(order.sort().values, torch.arange(matrix.columns)):
        raise ValueError("the order of its columns is no permutation")
    return QuantizedWeight(codes, scales, zeros, layout, matrix.rows, matrix.columns, dtype, order)


def _matrices(model: nn.Module) -> Iterator[tuple[str, Weight]]:
    """Every matrix once, by the first path that leads to it."""
    seen = set()
    for path, module in model.named_modules():
        if isinstance(module, WeightModule) and id(module.matrix) not in seen:
            seen.add(id(module.matrix))
            yield path, module.matrix


def _others(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every other parameter and persistent buffer once."""
    seen = set()
    found: Mapping[str, Tensor] = model.state_dict(keep_vars=True)
    for name, tensor in found.items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, tensor
