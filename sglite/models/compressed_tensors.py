"""Checkpoints of the library compressed-tensors in its format "pack-quantized": 4 or 8 bits.

Per layer, with k inputs, n outputs, G groups and p = 32 / bits codes in a word, lowest bits first:
`weight_packed` int32 [n, ceil(k / p)] packs along k, `weight_scale` is [n, G], `weight_shape` holds
n and k. Codes are stored unsigned, 2^(bits - 1) above their value. Where the scheme is not
symmetric, `weight_zero_point` is int32 [ceil(n / p), G], packed along n in the same way, or int8
[n, G] as it is. `weight_g_idx` int32 [k], where there is one, says the group of each input.
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
    refuse,
    signed,
    unpack_codes,
)
from sglite.ops import QuantizedLayout, QuantizedRows

_NAME = "compressed-tensors"
_FORMAT = "pack-quantized"
_SCALES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Scheme:
    """How the layers of one of the config's groups are quantised.

    Attributes:
        targets: names, classes or patterns ("re:...") of layers.
        bits: 4 or 8.
        group_size: inputs in a group; None: all.
        symmetric: whether there are no zero points.
    """

    targets: tuple[str, ...]
    bits: int
    group_size: int | None
    symmetric: bool


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
        sparsity = (values.get("sparsity_config") or {}).get("format", "dense")
        if sparsity != "dense":
            raise refuse(_NAME, "sparsity_config.format", sparsity, "dense")
        groups = values.get("config_groups")
        if not isinstance(groups, Mapping) or not groups:
            raise CheckpointError(f"config.json: config_groups={groups!r} of {_NAME} is no mapping")
        return cls(tuple(_scheme(name, group) for name, group in groups.items()))

    def layout(self, tensors: QuantizedTensors) -> QuantizedLayout:
        """See the base class."""
        n, k = tensors.shape
        scheme = self._scheme_of(tensors.name)
        per_word = 32 // scheme.bits
        group_size = min(scheme.group_size or k, k)
        groups = -(-k // group_size)
        tensors.check("weight_packed", (n, -(-k // per_word)), torch.int32)
        tensors.check("weight_shape", (2,), torch.int64, torch.int32)
        if tensors.read("weight_shape").tolist() != [n, k]:
            raise CheckpointError(
                f"tensor {tensors.name}.weight_shape says "
                f"{tensors.read('weight_shape').tolist()}, where the model has [{n}, {k}]"
            )
        if tensors.found["weight_scale"][1].shape != (1,):  # one for the whole weight
            tensors.check("weight_scale", (n, groups), *_SCALES)
        if "weight_g_idx" in tensors.found:
            tensors.check("weight_g_idx", (k,), torch.int32, torch.int64)
        if not scheme.symmetric:
            if "weight_zero_point" in tensors.found and self._zeros_are_plain(tensors):
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
        scheme = self._scheme_of(tensors.name)
        words = tensors.read("weight_packed")[start:stop]
        codes = signed(unpack_codes(words, scheme.bits)[:, :k], scheme.bits)
        scales = tensors.read("weight_scale")
        scales = scales.expand(n, 1) if scales.ndim == 1 else scales
        zeros = None if scheme.symmetric else self._zeros(tensors, scheme, start, stop)
        return QuantizedRows(codes, scales[start:stop], zeros)

    def _zeros(self, tensors: QuantizedTensors, scheme: Scheme, start: int, stop: int) -> Tensor:
        """[stop - start, G] int8."""
        stored = tensors.read("weight_zero_point")
        if self._zeros_are_plain(tensors):
            return stored[start:stop]
        per_word = 32 // scheme.bits
        words = stored[start // per_word : -(-stop // per_word)].T
        return signed(unpack_codes(words, scheme.bits), scheme.bits)[:, : stop - start].T

    @staticmethod
    def _zeros_are_plain(tensors: QuantizedTensors) -> bool:
        return tensors.dtype("weight_zero_point") == torch.int8

    def _scheme_of(self, name: str) -> Scheme:
        """The scheme of a layer: one that names it, else one that names all linear layers."""
        for scheme in self.schemes:
            if any(_names(target, name) for target in scheme.targets):
                return scheme
        for scheme in self.schemes:
            if "Linear" in scheme.targets:
                return scheme
        raise CheckpointError(
            f"tensor {name}.{self.marker} is quantised, but no group of config_groups in "
            f"config.json names it"
        )


def _names(target: str, name: str) -> bool:
    """Whether a target is a layer's name, or a pattern that it begins with."""
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), name) is not None
    return target == name


def _scheme(name: str, group: Any) -> Scheme:
    if not isinstance(group, Mapping) or not isinstance(group.get("weights"), Mapping):
        raise UnsupportedModelError(
            f"quantization_config ({_NAME}): config_groups[{name!r}] has no weights, which is not "
            f"implemented"
        )
    for setting in ("input_activations", "output_activations"):
        if group.get(setting):
            raise refuse(_NAME, f"config_groups[{name!r}].{setting}", group[setting], "None")
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
    if group.get("format") not in (_FORMAT, None):
        raise refuse(_NAME, f"config_groups[{name!r}].format", group["format"], _FORMAT)
    group_size = weights.get("group_size")
    is_group = weights.get("strategy") == "group" or (
        weights.get("strategy") is None and (group_size or 0) > 0
    )
    if is_group and not (isinstance(group_size, int) and group_size > 0):
        raise refuse(_NAME, "weights.group_size", group_size, "a positive number")
    return Scheme(
        targets=tuple(group.get("targets") or ()),
        bits=weights["num_bits"],
        group_size=group_size if is_group else None,
        symmetric=bool(weights.get("symmetric", True)),
    )
