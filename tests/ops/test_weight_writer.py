"""Weights written together: the bits that one at a time give, wherever rows begin and end."""

import pytest
import torch

from sglite.models.safetensors_file import SafetensorsFile
from sglite.ops import (
    PackedWeight,
    QuantizedLayout,
    QuantizedWeight,
    WeightMemory,
    WeightWriter,
    pack_weight,
    quantize_weight,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Rows and columns; the last is cut into several pieces.
SHAPES = [(1, 1), (31, 7), (32, 64), (97, 33), (5000, 520)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_packs_as_one_at_a_time(dtype):
    writer, memory = WeightWriter(), WeightMemory()
    plain = [torch.randn(shape).to(dtype) for shape in SHAPES]
    written = []
    for weight in plain:
        packed = PackedWeight.empty(*weight.shape, dtype, memory)
        middle = len(weight) // 3  # rows of one panel from both
        writer.add(packed, 0, weight[:middle])
        writer.add(packed, middle, weight[middle:])
        written.append(packed)
    assert writer.num_bytes == sum(weight.nbytes for weight in plain)
    writer.run()
    assert writer.num_bytes == 0
    for packed, weight in zip(written, plain, strict=True):
        assert torch.equal(packed.storage, pack_weight(weight).storage)
        assert torch.equal(packed.unpack(), weight)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [32, 10_000])
def test_quantises_as_one_at_a_time(dtype, bits, group_size):
    layout = QuantizedLayout(bits, group_size)
    writer, memory = WeightWriter(), WeightMemory()
    plain = [torch.randn(shape).to(dtype) for shape in SHAPES]
    written = [QuantizedWeight.empty(*w.shape, layout, dtype, memory=memory) for w in plain]
    for quantized, weight in zip(written, plain, strict=True):
        middle = len(weight) // 3
        writer.add(quantized, middle, weight[middle:])
        writer.add(quantized, 0, weight[:middle])
    writer.run()
    for quantized, weight in zip(written, plain, strict=True):
        expected = quantize_weight(weight, layout)
        assert torch.equal(quantized.codes, expected.codes)
        assert torch.equal(quantized.scales, expected.scales)


def test_pages_of_a_mapped_file_are_given_back(tmp_path):
    from safetensors.torch import save_file

    weight = torch.randn(4096, 1024)
    save_file({"before": torch.randn(3), "w": weight}, tmp_path / "w.safetensors")
    with SafetensorsFile(tmp_path / "w.safetensors") as file:
        rows = file.read(file.entries["w"])
        writer = WeightWriter()
        packed = PackedWeight.empty(4096, 1024, torch.float32)
        writer.add(packed, 0, rows, is_mapped=True)
        writer.run()
        assert torch.equal(packed.unpack(), weight)
        assert torch.equal(rows, weight)  # read again, from the file
        del rows


def test_what_does_not_fit_is_refused_when_it_is_noted():
    writer = WeightWriter()
    packed = PackedWeight.empty(8, 16, torch.bfloat16)
    with pytest.raises(ValueError, match="rows: expected bfloat16"):
        writer.add(packed, 0, torch.zeros(8, 16))
    with pytest.raises(ValueError, match="rows 4 to 12 of a weight with 8 rows"):
        writer.add(packed, 4, torch.zeros(8, 16).bfloat16())
    with_zeros = QuantizedWeight.empty(8, 16, QuantizedLayout(8, 16, has_zeros=True), torch.float32)
    with pytest.raises(ValueError, match="without zero points"):
        writer.add(with_zeros, 0, torch.zeros(8, 16))
    writer.run()


def test_memory_is_apart_and_aligned():
    memory = WeightMemory()
    taken = [memory.take((size,), torch.int8) for size in (1, 63, 64, 65, 3 << 20, 70 << 20, 5)]
    for index, tensor in enumerate(taken):
        assert tensor.data_ptr() % 64 == 0
        tensor.fill_(index)
    for index, tensor in enumerate(taken):
        assert (tensor == index).all()
