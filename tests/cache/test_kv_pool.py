"""The key/value tensors."""

import gc
import weakref

import pytest
import torch

from sglite.cache import KVPool, LayerSpec

LAYERS = [LayerSpec(2, 8), LayerSpec(1, 24), LayerSpec(4, 8)]


def filled_pool():
    pool = KVPool(5, 4, LAYERS, torch.float32)
    for number, tensor in enumerate(tensor for pair in pool.layers for tensor in pair):
        tensor.copy_(torch.arange(tensor.numel()).view(tensor.shape) + 1e5 * number)
    return pool


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_shapes_and_sizes(dtype):
    pool = KVPool(5, 4, LAYERS, dtype)
    assert [keys.shape for keys, _ in pool.layers] == [(5, 4, 2, 8), (5, 4, 1, 24), (5, 4, 4, 8)]
    assert all(keys.shape == values.shape for keys, values in pool.layers)
    assert all(tensor.dtype == dtype for pair in pool.layers for tensor in pair)
    assert pool.bytes_per_token == 2 * (16 + 24 + 32) * dtype.itemsize
    assert pool.num_bytes == 5 * 4 * pool.bytes_per_token


def test_the_reserved_page_is_zero(monkeypatch):
    def dirty(*args, **kwargs):
        return torch.full(*args, float("nan"), **kwargs)

    monkeypatch.setattr(torch, "empty", dirty)
    pool = KVPool(3, 4, LAYERS, torch.float32)
    for tensor in (tensor for pair in pool.layers for tensor in pair):
        assert torch.equal(tensor[0], torch.zeros_like(tensor[0]))
        assert tensor[1:].isnan().all()


def test_copies_slots_in_every_layer():
    pool = filled_pool()
    before = [tensor.clone() for pair in pool.layers for tensor in pair]
    # Two copies on write at once: 3 slots of page 1 into page 3, 1 slot of page 2 into page 4.
    pool.copy_slots([4, 5, 6, 8], torch.tensor([12, 13, 14, 16]))
    after = [tensor for pair in pool.layers for tensor in pair]
    for old, new in zip(before, after, strict=True):
        expected = old.clone()
        expected[3, :3] = old[1, :3]
        expected[4, :1] = old[2, :1]
        assert torch.equal(new, expected)


def test_copies_may_overlap():
    pool = filled_pool()
    keys = pool.layers[0][0]
    before = keys.clone()
    pool.copy_slots([4, 5, 6], [5, 6, 7])
    assert torch.equal(keys[1, 1:], before[1, :3])
    pool.copy_slots([], [])


def test_refuses_slots_that_do_not_exist():
    pool = filled_pool()
    before = pool.layers[0][0].clone()
    with pytest.raises(
        ValueError, match=r"source_slots has shape \[2\] and destination_slots \[1\]"
    ):
        pool.copy_slots([1, 2], [3])
    for source, destination in (([20], [4]), ([4], [20]), ([-1], [4]), ([4], [-1])):
        with pytest.raises((IndexError, RuntimeError)):
            pool.copy_slots(source, destination)
    assert torch.equal(pool.layers[0][0], before)


def test_close_frees_the_tensors():
    pool = KVPool(3, 4, LAYERS, torch.float32)
    tensors = [weakref.ref(tensor) for pair in pool.layers for tensor in pair]
    pool.close()
    pool.close()
    gc.collect()
    assert all(tensor() is None for tensor in tensors)
    assert (pool.layers, pool.num_bytes) == ([], 0)
    with pytest.raises(RuntimeError, match="the KV pool is closed"):
        pool.copy_slots([0], [1])


def test_memory_is_taken_only_when_written_to():
    def resident_bytes():
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * 4096

    before = resident_bytes()
    pool = KVPool(100_000, 16, [LayerSpec(8, 128)], torch.bfloat16)
    assert pool.num_bytes > 6e9
    assert resident_bytes() - before < 1e8


def test_names_what_is_wrong():
    with pytest.raises(ValueError, match="num_pages is 0; it must be 1 or more"):
        KVPool(0, 16, LAYERS, torch.float32)
    with pytest.raises(ValueError, match="page_size is -2; it must be 1 or more"):
        KVPool(2, -2, LAYERS, torch.float32)
    with pytest.raises(ValueError, match="layers is empty"):
        KVPool(2, 16, [], torch.float32)
    with pytest.raises(ValueError, match="head_dim is 0; it must be 1 or more"):
        LayerSpec(2, 0)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_on_a_gpu():
    pool = KVPool(5, 4, LAYERS, torch.bfloat16, "cuda")
    for tensor in (tensor for pair in pool.layers for tensor in pair):
        assert tensor.is_cuda
        assert not tensor[0].any()
        tensor.copy_(torch.arange(tensor.numel(), device="cuda").view(tensor.shape))
    pool.copy_slots([4, 5], torch.tensor([12, 13]))
    for tensor in (tensor for pair in pool.layers for tensor in pair):
        assert torch.equal(tensor[3, :2], tensor[1, :2])
