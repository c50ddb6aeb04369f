"""Matching a checkpoint's tensors with a model's weights, and filling them in.

Every parameter and persistent buffer of a model is filled from the checkpoint; a tensor that the
model makes itself belongs in a buffer registered with `persistent=False`. A stacked layer is filled
from several tensors, as the model class says in `stacked_params`:

    stacked_params = {"qkv_proj": ("q_proj", "k_proj", "v_proj")}

reads `....q_proj.weight` into the first part of `....qkv_proj`, and so on. One name alone is what a
checkpoint calls an ordinary linear layer. Where checkpoints have several layouts,

    checkpoint_renames = {"^model[.]language_model[.]": "model."}

rewrites parts of names (regular expressions, one after the other) before anything else. Tensors
that match `unused_tensors` may be there, and are not read.
"""

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from sglite.interface.errors import CheckpointError
from sglite.layers.weight import Weight
from sglite.models.quantized_format import QuantizedFormat
from sglite.models.quantized_weights import QuantizedPart, choose_layouts, take_quantized
from sglite.models.safetensors_file import SafetensorsFile, TensorEntry
from sglite.models.targets import Target, targets_of
from sglite.ops import WeightMemory, WeightWriter

#: Names of tensors that old checkpoints hold and that are computed from the config.
HARMLESS = re.compile(r"(^|\.)rotary_emb\.(inv_freq|cos_cached|sin_cached)$")
_NAMES_SHOWN = 5
# Bytes of tensors that threads share out among them, between two looks for an interrupt.
_WRITTEN_AT_ONCE = 1 << 30
# Elements of tied tensors.
_COMPARED_AT_ONCE = 1 << 20


def load_weights(
    model: nn.Module,
    files: Sequence[SafetensorsFile],
    quantized: QuantizedFormat | None = None,
) -> None:
    """Fills a model from weight files, tensor by tensor; nothing is written if a header is wrong.

    Args:
        model: its packed weights have the dtype to store; tensors of others are converted.
        files: their tensors together are the model's, no more and no less.
        quantized: how the files hold quantised layers; None: there are none.

    Raises:
        CheckpointError: tensors are missing, left over, misshapen, there twice, of a kind that is
            no float, or beyond the range of the dtype; the message names them and the file.
        UnsupportedModelError: a layer is quantised in a way that is not implemented.
    """
    targets = targets_of(model)
    found = _collect(files, getattr(model, "checkpoint_renames", {}))
    parts: dict[str, QuantizedPart] = {}
    if quantized is not None:
        parts = take_quantized(targets, found, quantized)
    unused = getattr(model, "unused_tensors", None)
    _check(targets, found, parts, re.compile(unused) if unused else None)
    choose_layouts(targets, parts)
    memory = WeightMemory()
    for target in targets.values():
        if isinstance(target.tensor, Weight):
            target.tensor.memory = memory
    _fill(targets, found)
    for part in parts.values():
        part.write(quantized)


def _fill(
    targets: Mapping[str, Target], found: Mapping[str, tuple[SafetensorsFile, TensorEntry]]
) -> None:
    """Fills the places of all tensors, most of them together."""
    filled: dict[tuple[int, int], str] = {}
    writer = WeightWriter()
    waiting: list[tuple[SafetensorsFile, TensorEntry]] = []

    def write_waiting() -> None:
        writer.run()
        for file, entry in waiting:
            file.release(entry)
        waiting.clear()

    for name, (file, entry) in found.items():
        target = targets.get(name)
        if target is None:
            continue
        first = filled.setdefault(target.key, name)
        if first != name:
            _check_same(found[first], (file, entry), target.dtype)
            continue
        value, is_mapped = file.read(entry), file.is_mapped(entry)
        _check_range(value, target.dtype, name, file)
        if target.add_to(writer, value, is_mapped=is_mapped):
            waiting.append((file, entry))
            del value
            # Copies are not kept: many of them would be a second checkpoint.
            if writer.num_bytes >= _WRITTEN_AT_ONCE or not is_mapped:
                write_waiting()
            continue
        target.write(value)
        del value
        file.release(entry)
    write_waiting()


def _collect(
    files: Sequence[SafetensorsFile], renames: Mapping[str, str]
) -> dict[str, tuple[SafetensorsFile, TensorEntry]]:
    """The tensors of all files, by the names that the model's class has for them."""
    found: dict[str, tuple[SafetensorsFile, TensorEntry]] = {}
    for file in files:
        for name, entry in file.entries.items():
            for pattern, replacement in renames.items():
                name = re.sub(pattern, replacement, name)
            if name in found:
                raise CheckpointError(
                    f"tensor {name!r} is in two files: {found[name][0].path} and {file.path}"
                )
            found[name] = file, entry
    return found


def _check(
    targets: Mapping[str, Target],
    found: Mapping[str, tuple[SafetensorsFile, TensorEntry]],
    parts: Mapping[str, QuantizedPart],
    may_be_unused: re.Pattern | None,
) -> None:
    filled = {targets[name].key for name in (*found, *parts) if name in targets}
    missing = [name for name, target in targets.items() if target.key not in filled]
    harmless = [HARMLESS] if may_be_unused is None else [HARMLESS, may_be_unused]
    unused = [
        name
        for name in found
        if name not in targets and not any(pattern.search(name) for pattern in harmless)
    ]
    misshapen = []
    for name, (file, entry) in found.items():
        target = targets.get(name)
        if target is None:
            continue
        if entry.shape != target.shape:
            misshapen.append(
                f"{name} {list(entry.shape)}, expected {list(target.shape)}, in {file.path.name}"
            )
        elif target.dtype.is_floating_point and not (
            entry.dtype is not None and entry.dtype.is_floating_point and entry.dtype.itemsize > 1
        ):
            misshapen.append(
                f"{name} of {entry.dtype_name}, expected F32, BF16, F16 or F64, in {file.path.name}"
            )
    folder = next((file.path.parent for file, _ in found.values()), None)
    unused = [f"{name} in {found[name][0].path.name}" for name in unused]
    refuse_misfits(f"the tensors in {folder}", missing, unused, misshapen)


def refuse_misfits(
    what: str, missing: Sequence[str], unused: Sequence[str], misshapen: Sequence[str]
) -> None:
    """Raises a CheckpointError that lists what does not fit; does nothing where all does.

    Args:
        what: does not fit the model.
        missing: the model's tensors that are not there.
        unused: tensors that the model does not have.
        misshapen: tensors of the wrong shape or kind, and what was expected.
    """
    problems = [
        f"{title}: {_some(names)}"
        for title, names in (
            ("missing", missing),
            ("not used by the model", unused),
            ("of the wrong shape or kind", misshapen),
        )
        if names
    ]
    if problems:
        raise CheckpointError(
            f"{what} do not fit the model that its config.json describes:\n  "
            + "\n  ".join(problems)
        )


def _check_same(
    first: tuple[SafetensorsFile, TensorEntry],
    second: tuple[SafetensorsFile, TensorEntry],
    dtype: torch.dtype,
) -> None:
    """Two tensors for one place, as of a tied embedding and head, must be one when converted."""
    pieces = (file.pieces(entry, _COMPARED_AT_ONCE) for file, entry in (first, second))
    for one, other in zip(*pieces, strict=True):
        if not torch.equal(one.to(dtype), other.to(dtype)):
            file, entry = second
            raise CheckpointError(
                f"{file.path}: tensor {entry.name!r} is tied to another one in this model "
                f"(tie_word_embeddings), but their values differ"
            )


def _check_range(value: Tensor, dtype: torch.dtype, name: str, file: SafetensorsFile) -> None:
    """Only float16 has a range that real weights may leave."""
    if dtype == torch.float16 and value.dtype != torch.float16 and value.numel():
        lowest, highest = (end.item() for end in value.aminmax())  # no copy, as `abs` makes one
        largest = max(-lowest, highest)
        if largest > torch.finfo(torch.float16).max:
            raise CheckpointError(
                f"{file.path}: tensor {name!r} has a value of {largest:.3g}, beyond float16's "
                f"range; run in bfloat16 or float32"
            )


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_NAMES_SHOWN])
    rest = len(names) - _NAMES_SHOWN
    return f"{shown}, and {rest} more" if rest > 0 else shown
