"""Small checkpoints in the ecosystem's quantised layouts, packed by numpy, element by element.

Every writer follows the layout's specification alone: a loop over elements that puts a code into
its place. The oracle is the Hugging Face model in float32, of a checkpoint whose weights are what
the codes stand for.
"""

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.checkpoints import edit_json, hugging_face

WEIGHT_FILE = "model.safetensors"
#: Linear layers of decoders, without routers and heads.
LINEAR = r"(_proj|[.]w[123])$"
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
    weight: Quantized,
    *,
    symmetric: bool,
    plain_zeros: bool = False,
    with_index: bool = False,
    is_whole: bool = False,
) -> dict[str, np.ndarray]:
    """The layout "pack-quantized" of compressed-tensors; `is_whole`: its strategy "tensor"."""
    tensors = {
        "weight_packed": pack(weight.codes, weight.bits, 1),
        "weight_scale": weight.scales[0] if is_whole else weight.scales,
        "weight_shape": np.array(weight.codes.shape),
    }
    if not symmetric:
        zeros = (weight.zeros - (1 << (weight.bits - 1))).astype(np.int8)
        packed = zeros if plain_zeros else pack(weight.zeros, weight.bits, 0)
        tensors["weight_zero_point"] = zeros[0] if is_whole else packed
    if with_index:
        tensors["weight_g_idx"] = weight.groups.astype(np.int32)
    return tensors


#: From a linear layer's name and shape to its weight and tensors; None leaves the layer as it is.
Quantizer = Callable[[str, int, int], tuple[Quantized, dict[str, np.ndarray]] | None]
#: A `quantization_config`, and what writes such layers.
Recipe = tuple[dict[str, Any], Quantizer]


def gptq(
    random: np.random.Generator,
    bits: int = 4,
    group_size: int = 32,
    version: int = 1,
    symmetric: bool = False,
    shuffled: bool = False,
) -> Recipe:
    """GPTQ; the layers of one input share the order of its columns."""
    config = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group_size,
        "desc_act": shuffled,
        "sym": symmetric,
    }
    if version == 2:
        config["checkpoint_format"] = "gptq_v2"
    orders = {}

    def quantize(path, n, k):
        weight = draw_weight(random, n, k, bits, group_size, symmetric=symmetric, shuffled=shuffled)
        block = path.rsplit(".", 1)[0] + ("/down" if "down" in path else "")
        block += "/o" if "o_proj" in path else ""
        weight.groups = orders.setdefault((block, k), weight.groups)
        return weight, gptq_tensors(weight, version=version)

    return config, quantize


def awq(random: np.random.Generator, group_size: int = 32) -> Recipe:
    """AWQ."""
    config = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group_size,
        "zero_point": True,
        "version": "gemm",
    }

    def quantize(path, n, k):
        weight = draw_weight(random, n, k, 4, group_size)
        return weight, awq_tensors(weight)

    return config, quantize


def compressed(
    random: np.random.Generator,
    bits: int = 4,
    group_size: int = 32,
    symmetric: bool = True,
    **others: bool,
) -> Recipe:
    """compressed-tensors; further arguments are those of `pack_quantized_tensors`."""
    is_whole = others.get("is_whole", False)
    strategy = "tensor" if is_whole else "channel" if group_size == -1 else "group"
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": strategy,
        "group_size": None if group_size == -1 else group_size,
        "dynamic": False,
    }
    config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
    }
    shuffled = others.get("with_index", False)

    def quantize(path, n, k):
        weight = draw_weight(random, n, k, bits, group_size, symmetric=symmetric, shuffled=shuffled)
        if is_whole:
            weight.scales[:], weight.zeros[:] = weight.scales[0], weight.zeros[0]
        return weight, pack_quantized_tensors(weight, symmetric=symmetric, **others)

    return config, quantize


@dataclass
class Made:
    """A checkpoint that was written, and its oracle.

    Attributes:
        folder: where it is.
        plain: the folder of the same model in float32, with the weights that codes stand for.
        weights: these weights by the layers' names.
    """

    folder: Path
    plain: Path
    weights: dict[str, np.ndarray] = field(default_factory=dict)

    @cached_property
    def oracle(self) -> nn.Module:
        """The Hugging Face model of `plain`."""
        return hugging_face(self.plain)


def quantize_checkpoint(
    folder: Path,
    config: dict[str, Any],
    quantize: Quantizer,
    *,
    extra: dict[str, np.ndarray] | None = None,
    layers: str = LINEAR,
) -> Made:
    """Puts quantised layers into a checkpoint of one file, with weights of their own.

    What is not quantised becomes float16.

    Args:
        folder: the checkpoint, in float32.
        config: the `quantization_config`.
        quantize: what becomes of a layer.
        extra: further tensors.
        layers: a regular expression that the layers' names fit, somewhere.
    """
    made = Made(folder, folder / "plain")
    made.plain.mkdir(exist_ok=True)
    for path in folder.iterdir():
        if path.is_file():
            shutil.copy(path, made.plain)
    tensors, plain = {}, {}
    for name, value in load_file(folder / WEIGHT_FILE).items():
        path = name.removesuffix(".weight")
        quantized = None
        if path != name and re.search(layers, path):
            quantized = quantize(path, *value.shape)
        if quantized is None:
            tensors[name] = value.to(torch.float16)
            plain[name] = tensors[name].float()
            continue
        weight, parts = quantized
        made.weights[path] = weight.numbers()
        plain[name] = torch.from_numpy(made.weights[path])
        for suffix, part in parts.items():
            tensors[f"{path}.{suffix}"] = torch.from_numpy(np.ascontiguousarray(part))
    for path, value in (extra or {}).items():
        tensors[path] = torch.from_numpy(value)
    save_file(tensors, folder / WEIGHT_FILE, metadata={"format": "pt"})
    save_file(plain, made.plain / WEIGHT_FILE, metadata={"format": "pt"})
    values = {"quantization_config": config, "torch_dtype": "float16", "dtype": "float16"}
    edit_json(folder / "config.json", values)
    return made
