"""Checkpoints in the layout of GPTQ (AutoGPTQ, GPTQModel): 4 or 8 bits, groups along the inputs.

Per layer, with k inputs, n outputs, G groups and p = 32 / bits codes in a word, lowest bits first:
`qweight` int32 [k / p, n] packs along k, `qzeros` int32 [G, n / p] packs along n, `scales` [G, n],
and `g_idx` int32 [k] says the group of each input (with `desc_act` they are no neighbours).
`weight[j, i] = (code[i, j] - zero[g_idx[i], j]) * scales[g_idx[i], j]`. In the first version of the
layout ("gptq") zero points are stored less one, modulo 2^bits; in "gptq_v2" as they are. (Frantar
et al., 2022.)
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

_NAME = "gptq"


@dataclass(frozen=True)
class GptqFormat(QuantizedFormat):
    """See the module.

    Attributes:
        bits: 4 or 8.
        group_size: inputs in a group; None: all.
        zero_offset: what is added to a stored zero point.
    """

    marker = "qweight"
    suffixes = ("qweight", "qzeros", "scales", "g_idx")

    bits: int
    group_size: int | None
    zero_offset: int

    @classmethod
    def from_config(cls, values: Mapping[str, Any]) -> "GptqFormat":
        """Reads `bits`, `group_size` and `checkpoint_format`."""
        bits = read_setting(_NAME, values, "bits", int)
        if bits not in (4, 8):
            raise refuse(_NAME, "bits", bits, "4, 8")
        group_size = read_group_size(_NAME, values, "group_size")
        layout = values.get("checkpoint_format") or values.get("format") or "gptq"
        if values.get("is_marlin_format"):
            layout = "marlin"
        if layout not in ("gptq", "gptq_v2"):
            raise refuse(_NAME, "checkpoint_format", layout, "gptq, gptq_v2")
        # Patterns with "-:" name layers that are not quantised, which shows in the tensors.
        dynamic = read_setting(_NAME, values, "dynamic", Mapping, {})
        settings = [key for key in dynamic if not key.startswith("-:")]
        if settings:
            raise refuse(_NAME, "dynamic", settings, "patterns of layers left out (-:)")
        return cls(bits, group_size, int(layout == "gptq"))

    def layout(self, tensors: QuantizedTensors) -> QuantizedLayout:
        """See the base class."""
        n, k = tensors.shape
        per_word = 32 // self.bits
        group_size = min(self.group_size or k, k)
        groups = -(-k // group_size)
        tensors.check("qweight", (-(-k // per_word), n), torch.int32)
        tensors.check("scales", (groups, n), torch.float16, torch.bfloat16, torch.float32)
        tensors.check("qzeros", (groups, -(-n // per_word)), torch.int32)
        if "g_idx" in tensors.found:
            tensors.check("g_idx", (k,), torch.int32, torch.int64)
        has_zeros = bool(self._zeros(tensors, 0, n).any())
        return QuantizedLayout(self.bits, group_size, has_zeros, tensors.dtype("scales"))

    def group_indices(self, tensors: QuantizedTensors) -> Tensor | None:
        """See the base class."""
        return tensors.read("g_idx").clone() if "g_idx" in tensors.found else None

    def rows(self, tensors: QuantizedTensors, start: int, stop: int) -> QuantizedRows:
        """See the base class."""
        words = tensors.read("qweight")[:, start:stop]
        codes = unpack_codes(words.unsqueeze(-1), self.bits)  # [k / p, rows, p]
        codes = signed(codes.transpose(0, 1).reshape(stop - start, -1), self.bits)
        scales = tensors.read("scales")[:, start:stop].T
        return QuantizedRows(
            codes[:, : tensors.shape[1]], scales, self._zeros(tensors, start, stop).T
        )

    def _zeros(self, tensors: QuantizedTensors, start: int, stop: int) -> Tensor:
        """Zero points of some outputs, [G, stop - start] int8."""
        per_word = 32 // self.bits
        words = tensors.read("qzeros")[:, start // per_word : -(-stop // per_word)]
        stored = unpack_codes(words, self.bits)[:, : stop - start]
        return signed((stored + self.zero_offset) & (2**self.bits - 1), self.bits)
