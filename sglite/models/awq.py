"""Checkpoints in the layout of AWQ (AutoAWQ's "gemm"): 4 bits, groups along the inputs.

Per layer, with k inputs, n outputs and G groups: `qweight` int32 [k, n / 8] and `qzeros` int32
[G, n / 8] pack along n, `scales` is [G, n]. The eight outputs of a word are interleaved: from the
lowest bits up they are 0, 2, 4, 6, 1, 3, 5, 7.
`weight[j, i] = (code[i, j] - zero[g, j]) * scales[g, j]`, g the group of i. (Lin et al., 2023.)
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sglite.models.quantized_format import (
    QuantizedFormat,
    QuantizedTensors,
    read_group_size,
    read_setting,
    refuse,
    signed,
    unpack_codes,
)
from sglite.ops import QuantizedLayout, QuantizedRows

_NAME = "awq"
_BITS = 4
_PER_WORD = 8
# Where output i of a word is, counted from the lowest bits.
_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)


@dataclass(frozen=True)
class AwqFormat(QuantizedFormat):
    """See the module.

    Attributes:
        group_size: inputs in a group; None: all.
    """

    marker = "qweight"
    suffixes = ("qweight", "qzeros", "scales")

    group_size: int | None

    @classmethod
    def from_config(cls, values: Mapping[str, Any]) -> "AwqFormat":
        """Reads `bits`, `group_size`, `version` and `zero_point`, also by their older names."""
        bits = read_setting(_NAME, values, "bits" if "bits" in values else "w_bit", int)
        if bits != _BITS:
            raise refuse(_NAME, "bits", bits, "4")
        version = str(values.get("version") or values.get("format") or "gemm").lower()
        if version != "gemm" or values.get("backend") == "llm-awq":
            raise refuse(_NAME, "version", version, "gemm")
        if not values.get("zero_point", True):
            raise refuse(_NAME, "zero_point", False, "True")
        size_name = "group_size" if "group_size" in values else "q_group_size"
        return cls(read_group_size(_NAME, values, size_name))

    def layout(self, tensors: QuantizedTensors) -> QuantizedLayout:
        """See the base class."""
        n, k = tensors.shape
        group_size = min(self.group_size or k, k)
        groups = -(-k // group_size)
        tensors.check("qweight", (k, -(-n // _PER_WORD)), torch.int32)
        tensors.check("qzeros", (groups, -(-n // _PER_WORD)), torch.int32)
        tensors.check("scales", (groups, n), torch.float16, torch.bfloat16, torch.float32)
        return QuantizedLayout(_BITS, group_size, True, tensors.dtype("scales"))

    def rows(self, tensors: QuantizedTensors, start: int, stop: int) -> QuantizedRows:
        """See the base class."""
        return QuantizedRows(
            _outputs(tensors.read("qweight"), start, stop).T,
            tensors.read("scales")[:, start:stop].T,
            _outputs(tensors.read("qzeros"), start, stop).T,
        )


def _outputs(words: Tensor, start: int, stop: int) -> Tensor:
    """Codes of some outputs, [inputs or groups, stop - start] int8."""
    words = words[:, start // _PER_WORD : -(-stop // _PER_WORD)]
    codes = unpack_codes(words, _BITS).unflatten(-1, (-1, _PER_WORD))[..., _PLACES].flatten(-2)
    return signed(codes, _BITS)[:, : stop - start]
