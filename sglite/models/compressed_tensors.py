"""Checkpoints of the library compressed-tensors in its format "pack-quantized": 4 or 8 bits.

Per layer, with k inputs, n outputs, G groups and p = 32 / bits codes in a word, lowest bits first:
`weight_packed` int32 [n, ceil(k / p)] packs along k, `weight_scale` is [n, G], `weight_shape` holds
n and k. Codes are stored unsigned, 2^(bits - 1) above their value. Where the scheme is not
symmetric, `weight_zero_point` is int32 [ceil(n / p), G], packed along n in the same way, or int8
[n, G] as it is. With the strategy "tensor" scale and zero point are one for the whole weight, [1],
the latter int8. `weight_g_idx` int32 [k], where there is one, says the group of each input.
`weight[j, i] = (code - zero) * scale`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sglite.interface.errors import CheckpointError, UnsupportedModelError
from sglite.models.quantized_format import (
    QuantizedFormat,
    QuantizedTensors,
    read_setting,
    refuse,
    signed,
    unpack_codes,
)
from sglite.ops import QuantizedLayout, QuantizedRows

_NAME = "compressed-tensors"
_FORMAT = "pack-quantized"
_IS_PATTERN = "re:"
_SCALES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Scheme:
    """How the layers of one of the config's groups are quantised.

    Attributes:
        names: layers, and classes of such.
        patterns: beginnings of layers' names.
        bits: 4 or 8.
        group_size: inputs in a group; None: all.
        symmetric: whether there are no zero points.
        is_whole: whether a weight has one scale.
    """

    names: frozenset[str]
    patterns: tuple[re.Pattern, ...]
    bits: int
    group_size: int | None
    symmetric: bool
    is_whole: bool

    def matches(self, name: str) -> bool:
        """Whether it is about the layer of this name."""
        return name in self.names or any(pattern.match(name) for pattern in self.patterns)


@dataclass(frozen=True)
class CompressedTensorsFormat(QuantizedFormat):
    """See the module.

    Attributes:
        schemes: one for each of the config's groups.
    """

    marker = "weight_packed"
    suffixes = (
        "weight_packed",
        "weight_scale",
        "weight_zero_point",
        "weight_shape",
        "weight_g_idx",
    )

    schemes: tuple[Scheme, ...]

    @classmethod
    def from_config(cls, values: Mapping[str, Any]) -> "CompressedTensorsFormat":
        """Reads `format` and `config_groups`; which layers are left out shows in the tensors."""
        if values.get("format") != _FORMAT:
            raise refuse(_NAME, "format", values.get("format"), _FORMAT)
        for setting in ("kv_cache_scheme", "transform_config"):
            if values.get(setting):
                raise refuse(_NAME, setting, values[setting], "None")
        sparsity = read_setting(_NAME, values, "sparsity_config", Mapping, {})
        sparsity = sparsity.get("format", "dense")
        if sparsity != "dense":
            raise refuse(_NAME, "sparsity_config.format", sparsity, "dense")
        groups = read_setting(_NAME, values, "config_groups", Mapping, {})
        if not groups:
            raise CheckpointError(f"quantization_config ({_NAME}): there are no config_groups")
        return cls(tuple(_scheme(name, group) for name, group in groups.items()))

    def layout(self, tensors: QuantizedTensors) -> QuantizedLayout:
        """See the base class."""
        n, k = tensors.shape
        scheme = self._scheme_of(tensors)
        per_word = 32 // scheme.bits
        group_size = min(scheme.group_size or k, k)
        groups = -(-k // group_size)
        tensors.check("weight_packed", (n, -(-k // per_word)), torch.int32)
        tensors.check("weight_shape", (2,), torch.int64, torch.int32)
        shape = tensors.read("weight_shape").tolist()
        if shape != [n, k]:
            raise CheckpointError(
                f"{tensors.place}.weight_shape says {shape}, where the model has [{n}, {k}]"
            )
        tensors.check("weight_scale", (1,) if scheme.is_whole else (n, groups), *_SCALES)
        if "weight_g_idx" in tensors.found:
            tensors.check("weight_g_idx", (k,), torch.int32, torch.int64)
        if scheme.symmetric:
            _check_no_zeros(tensors)
        elif scheme.is_whole:
            tensors.check("weight_zero_point", (1,), torch.int8)
        elif "weight_zero_point" in tensors.found and self._zeros_are_plain(tensors):
            tensors.check("weight_zero_point", (n, groups), torch.int8)
        else:
            tensors.check("weight_zero_point", (-(-n // per_word), groups), torch.int32)
        return QuantizedLayout(
            scheme.bits, group_size, not scheme.symmetric, tensors.dtype("weight_scale")
        )

    def group_indices(self, tensors: QuantizedTensors) -> Tensor | None:
        """See the base class; an index of -1 stands for none at all."""
        if "weight_g_idx" not in tensors.found:
            return None
        groups = tensors.read("weight_g_idx").clone()
        return None if (groups == -1).any() else groups

    def rows(self, tensors: QuantizedTensors, start: int, stop: int) -> QuantizedRows:
        """See the base class."""
        n, k = tensors.shape
        scheme = self._scheme_of(tensors)
        words = tensors.read("weight_packed")[start:stop]
        codes = signed(unpack_codes(words, scheme.bits)[:, :k], scheme.bits)
        scales = tensors.read("weight_scale")
        scales = scales.expand(n, 1) if scheme.is_whole else scales
        zeros = None if scheme.symmetric else self._zeros(tensors, scheme, start, stop)
        return QuantizedRows(codes, scales[start:stop], zeros)

    def _zeros(self, tensors: QuantizedTensors, scheme: Scheme, start: int, stop: int) -> Tensor:
        """[stop - start, G] int8."""
        stored = tensors.read("weight_zero_point")
        if scheme.is_whole:
            return stored.expand(stop - start, 1)
        if self._zeros_are_plain(tensors):
            return stored[start:stop]
        per_word = 32 // scheme.bits
        words = stored[start // per_word : -(-stop // per_word)].T
        return signed(unpack_codes(words, scheme.bits), scheme.bits)[:, : stop - start].T

    @staticmethod
    def _zeros_are_plain(tensors: QuantizedTensors) -> bool:
        return tensors.dtype("weight_zero_point") == torch.int8

    def _scheme_of(self, tensors: QuantizedTensors) -> Scheme:
        """The scheme of a layer: one that names it, else one that names all linear layers."""
        for scheme in self.schemes:
            if scheme.matches(tensors.name):
                return scheme
        for scheme in self.schemes:
            if "Linear" in scheme.names:
                return scheme
        raise CheckpointError(
            f"{tensors.place}.{self.marker} is quantised, but no group of config_groups in "
            f"config.json names it"
        )


def _check_no_zeros(tensors: QuantizedTensors) -> None:
    """Zero points of a symmetric scheme, which some writers add, are zero."""
    if "weight_zero_point" in tensors.found:
        file, entry = tensors.found["weight_zero_point"]
        if entry.dtype is None or tensors.read("weight_zero_point").float().any():
            raise CheckpointError(
                f"{file.path}: {tensors.name}.weight_zero_point holds zero points, but config.json "
                f"says that the layer is symmetric"
            )


def _scheme(name: str, group: Any) -> Scheme:
    if not isinstance(group, Mapping) or not isinstance(group.get("weights"), Mapping):
        raise UnsupportedModelError(
            f"quantization_config ({_NAME}): config_groups[{name!r}] has no weights, which is not "
            f"implemented"
        )
    for setting in ("input_activations", "output_activations"):
        if group.get(setting):
            raise refuse(_NAME, f"config_groups[{name!r}].{setting}", group[setting], "None")
    if group.get("format") not in (_FORMAT, None):
        raise refuse(_NAME, f"config_groups[{name!r}].format", group["format"], _FORMAT)
    weights = group["weights"]
    known: dict[str, tuple] = {
        "num_bits": (4, 8),
        "type": ("int", None),
        "strategy": ("group", "channel", "tensor", None),
        "dynamic": (False, None),
    }
    for setting, values in known.items():
        if weights.get(setting) not in values:
            listed = ", ".join(str(value) for value in values if value is not None)
            raise refuse(_NAME, f"weights.{setting}", weights.get(setting), listed)
    group_size = read_setting(_NAME, weights, "group_size", int)
    strategy = weights.get("strategy")
    if strategy is None:
        by_size = "channel" if group_size == -1 else "group"
        strategy = "tensor" if group_size is None else by_size
    if strategy == "group" and (group_size is None or group_size < 1):
        raise refuse(_NAME, "weights.group_size", group_size, "a positive number")
    names, patterns = _targets(group)
    return Scheme(
        names=names,
        patterns=patterns,
        bits=read_setting(_NAME, weights, "num_bits", int),
        group_size=group_size if strategy == "group" else None,
        symmetric=read_setting(_NAME, weights, "symmetric", bool, True),
        is_whole=strategy == "tensor",
    )


def _targets(group: Mapping[str, Any]) -> tuple[frozenset[str], tuple[re.Pattern, ...]]:
    """The names and the patterns among a group's targets."""
    targets = read_setting(_NAME, group, "targets", list, [])
    names, patterns = [], []
    for target in targets:
        if not isinstance(target, str):
            raise CheckpointError(
                f"quantization_config ({_NAME}): targets={targets!r} must be a list of names"
            )
        if not target.startswith(_IS_PATTERN):
            names.append(target)
            continue
        try:
            patterns.append(re.compile(target.removeprefix(_IS_PATTERN)))
        except (re.error, OverflowError, RecursionError) as error:
            raise CheckpointError(
                f"quantization_config ({_NAME}): {target!r} in targets is no regular expression: "
                f"{error}"
            ) from error
    return frozenset(names), tuple(patterns)
