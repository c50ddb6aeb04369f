"""Small checkpoints in the ecosystem's quantised layouts, packed by numpy, element by element.

Every writer follows the layout's specification alone: a loop over elements that puts a code into
its place. The oracle is the Hugging Face model in float32 whose weights are set to what the codes
stand for.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from tests.checkpoints import make_model, make_tokenizer

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass
class Quantized:
    """A weight [n, k] as a quantiser leaves it, in the notation of its layout.

    Attributes:
        codes: [n, k], unsigned.
        scales: [n, groups] float16.
        zeros: [n, groups], unsigned.
        groups: [k], the group of each column.
        bits: of a code.
    """

    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray
    groups: np.ndarray
    bits: int

    def numbers(self) -> np.ndarray:
        """What it stands for, [n, k] float32."""
        differences = self.codes.astype(np.float32) - self.zeros.astype(np.float32)[:, self.groups]
        return differences * self.scales.astype(np.float32)[:, self.groups]


def draw_weight(
    random: np.random.Generator,
    n: int,
    k: int,
    bits: int,
    group_size: int,
    *,
    symmetric: bool = False,
    shuffled: bool = False,
    lowest_zero: int = 0,
) -> Quantized:
    """Codes over the whole range; `shuffled`: groups of columns that are no neighbours."""
    group_size = k if group_size == -1 else group_size
    count = -(-k // group_size)
    groups = np.arange(k) // group_size
    if shuffled:
        groups = random.permutation(groups)
    half = 1 << (bits - 1)
    zeros = np.full((n, count), half)
    if not symmetric:
        zeros = random.integers(lowest_zero, 2 * half, (n, count))
    scales = (0.5 + random.random((n, count))) / (half * np.sqrt(k))
    codes = random.integers(0, 2 * half, (n, k))
    return Quantized(codes, scales.astype(np.float16), zeros, groups, bits)


def pack(values: np.ndarray, bits: int, axis: int, order=None) -> np.ndarray:
    """Unsigned codes in 32-bit words along an axis, the first in the lowest bits.

    Where there is an `order`, place p of a word holds its element `order[p]`.
    """
    values = np.moveaxis(values, axis, 0)
    per_word = 32 // bits
    words = np.zeros((-(-len(values) // per_word), *values.shape[1:]), np.uint32)
    for place in range(per_word):
        element = place if order is None else order[place]
        for word in range(len(words)):
            if word * per_word + element < len(values):
                code = values[word * per_word + element].astype(np.uint32)
                words[word] |= code << np.uint32(bits * place)
    return np.moveaxis(words, 0, axis).astype(np.uint32).view(np.int32).copy()


def gptq_tensors(weight: Quantized, *, version: int = 1) -> dict[str, np.ndarray]:
    """AutoGPTQ's layout; its first version stores zero points less one."""
    zeros = (weight.zeros - (1 if version == 1 else 0)) % (1 << weight.bits)
    return {
        "qweight": pack(weight.codes.T, weight.bits, 0),
        "qzeros": pack(zeros.T, weight.bits, 1),
        "scales": weight.scales.T.copy(),
        "g_idx": weight.groups.astype(np.int32),
    }


def awq_tensors(weight: Quantized) -> dict[str, np.ndarray]:
    """AutoAWQ's "gemm" layout."""
    return {
        "qweight": pack(weight.codes.T, 4, 1, AWQ_ORDER),
        "qzeros": pack(weight.zeros.T, 4, 1, AWQ_ORDER),
        "scales": weight.scales.T.copy(),
    }


def pack_quantized_tensors(
    weight: Quantized, *, symmetric: bool, plain_zeros: bool = False, with_index: bool = False
) -> dict[str, np.ndarray]:
    """The layout "pack-quantized" of compressed-tensors."""
    tensors = {
        "weight_packed": pack(weight.codes, weight.bits, 1),
        "weight_scale": weight.scales,
        "weight_shape": np.array(weight.codes.shape),
    }
    if not symmetric:
        zeros = weight.zeros - (1 << (weight.bits - 1))
        tensors["weight_zero_point"] = (
            zeros.astype(np.int8) if plain_zeros else pack(weight.zeros, weight.bits, 0)
        )
    if with_index:
        tensors["weight_g_idx"] = weight.groups.astype(np.int32)
    return tensors


def pack_quantized_config(
    bits: int, group_size: int, *, symmetric: bool = True, **others: Any
) -> dict[str, Any]:
    """Its `quantization_config`."""
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "channel" if group_size == -1 else "group",
        "group_size": None if group_size == -1 else group_size,
        "dynamic": False,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
        **others,
    }


@dataclass
class Made:
    """A checkpoint that was written, and its oracle.

    Attributes:
        folder: where it is.
        oracle: the Hugging Face model in float32 with the weights that codes stand for.
        weights: these weights by the layers' names.
    """

    folder: Path
    oracle: nn.Module
    weights: dict[str, np.ndarray] = field(default_factory=dict)


def make_quantized(
    folder: Path,
    name: str,
    config: dict[str, Any],
    quantize: Callable[[str, int, int], tuple[Quantized, dict[str, np.ndarray]] | None],
    *,
    extra: dict[str, np.ndarray] | None = None,
    dtype: str = "float16",
    **overrides: Any,
) -> Made:
    """Writes a model of `tests.checkpoints.CONFIGS` with quantised linear layers.

    Args:
        folder: where to; made if it is not there.
        name: a key of `CONFIGS`.
        config: the `quantization_config`.
        quantize: from a linear layer's name and shape to its weight and tensors; None leaves the
            layer as it is.
        extra: further tensors.
        dtype: of the tensors that are not quantised.
        **overrides: of the model's config.
    """
    model = make_model(name, **overrides)
    model.to(getattr(torch, dtype)).float()
    made = Made(folder, model)
    linear = {path: module for path, module in model.named_modules() if type(module) is nn.Linear}
    tensors = {}
    for path, module in linear.items():
        quantized = None if path == "lm_head" else quantize(path, *module.weight.shape)
        if quantized is None:
            continue
        weight, parts = quantized
        made.weights[path] = weight.numbers()
        module.weight.data = torch.from_numpy(made.weights[path])
        for suffix, value in parts.items():
            tensors[f"{path}.{suffix}"] = torch.from_numpy(np.ascontiguousarray(value))
    for path, value in model.state_dict().items():
        is_tied = path == "lm_head.weight" and model.config.tie_word_embeddings
        if path.removesuffix(".weight") not in made.weights and not is_tied:
            tensors[path] = value.to(getattr(torch, dtype))
    for path, value in (extra or {}).items():
        tensors[path] = torch.from_numpy(value)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model.config.save_pretrained(folder)
    values = json.loads((folder / "config.json").read_text())
    values |= {
        "quantization_config": config,
        "torch_dtype": dtype,
        "dtype": dtype,
        "architectures": [type(model).__name__],
    }
    (folder / "config.json").write_text(json.dumps(values))
    make_tokenizer().save_pretrained(folder)
    return made
