"""Memory of tensors that are gone is used again, and no other."""

import gc

import torch

from sglite import ops

LARGE = (3, 1 << 19)  # of float32: 6 MB


def test_what_nothing_holds_is_used_again():
    memory = ops.SpareMemory()
    first = memory.empty(LARGE, torch.float32)
    address = first.data_ptr()
    del first
    assert memory.spare_bytes >= 6 << 20
    again = memory.empty((1 << 19, 5), torch.bfloat16)
    assert again.data_ptr() == address
    assert again.shape == (1 << 19, 5)
    assert again.dtype == torch.bfloat16
    assert again.is_contiguous()
    assert memory.spare_bytes == 0


def test_what_a_view_holds_is_left_alone():
    memory = ops.SpareMemory()
    first = memory.empty(LARGE, torch.float32)
    first.fill_(1)
    row = first[1, :7]
    del first
    second = memory.empty(LARGE, torch.float32)
    second.fill_(2)
    assert row.tolist() == [1] * 7
    del row
    third = memory.empty(LARGE, torch.float32)
    third.fill_(3)
    assert second.min() == second.max() == 2


def test_a_larger_one_takes_the_place_of_one_too_small():
    memory = ops.SpareMemory()
    smaller = memory.empty(LARGE, torch.float32)
    del smaller
    larger = memory.empty((4 << 20,), torch.float32)
    assert memory.spare_bytes == 0
    del larger
    assert 16 << 20 <= memory.spare_bytes < 20 << 20


def test_the_smallest_that_is_large_enough_is_taken():
    memory = ops.SpareMemory()
    sizes = [8 << 20, 2 << 20, 4 << 20]
    tensors = {size: memory.empty((size,), torch.uint8) for size in sizes}
    addresses = {size: tensor.data_ptr() for size, tensor in tensors.items()}
    tensors.clear()
    assert memory.empty((3 << 20,), torch.uint8).data_ptr() == addresses[4 << 20]
    assert memory.spare_bytes == sum(sizes)


def test_few_blocks_are_kept():
    memory = ops.SpareMemory()
    held = [memory.empty((2 << 20,), torch.uint8) for _ in range(20)]
    assert len({tensor.data_ptr() for tensor in held}) == 20
    held.clear()
    assert memory.spare_bytes == 4 * (2 << 20)
    memory.drop()
    assert memory.spare_bytes == 0


def test_a_tensor_outlives_what_gave_it():
    memory = ops.SpareMemory()
    tensor = memory.empty(LARGE, torch.float32)
    tensor.fill_(5)
    del memory
    gc.collect()
    assert tensor.min() == tensor.max() == 5


def test_tensors_start_at_cache_lines():
    memory = ops.SpareMemory()
    for shape in [(1,), (1000,), (1 << 20,), (3 << 20,)]:
        assert memory.empty(shape, torch.uint8).data_ptr() % 64 == 0


def test_small_tensors_are_not_kept():
    memory = ops.SpareMemory()
    small = memory.empty((1000,), torch.uint8)
    assert small.shape == (1000,)
    del small
    assert memory.spare_bytes == 0
