"""Writing keys and values into pages."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglite import ops
from sglite.ops import reference
from tests.ops.closeness import DTYPES


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(0, 40),
    heads=st.integers(1, 4),
    head_dim=st.integers(1, 70),
    page_size=st.integers(1, 20),
    seed=st.integers(0, 2**31),
)
def test_matches_reference(dtype, tokens, heads, head_dim, page_size, seed):
    generator = torch.Generator().manual_seed(seed)
    pages = -(-tokens // page_size) + 2
    qkv = torch.randn(tokens, 3 * heads, head_dim, generator=generator).to(dtype)
    _, k, v = qkv.chunk(3, 1)
    slots = torch.randperm(pages * page_size, generator=generator)[:tokens]
    caches = [torch.randn(pages, page_size, heads, head_dim).to(dtype) for _ in range(2)]
    expected = [cache.clone() for cache in caches]
    reference.write_kv(k, v, *expected, slots)
    ops.write_kv(k, v, *caches, slots)
    for actual, wanted in zip(caches, expected, strict=True):
        assert torch.equal(actual, wanted)


def test_every_path_and_thread_count(cpu_path, num_threads):
    k, v = torch.randn(2, 3000, 2, 64).unbind()  # enough work for two threads
    slots = torch.randperm(200 * 16)[:3000]
    caches = torch.zeros(2, 200, 16, 2, 64)
    ops.write_kv(k, v, *caches, slots)
    assert torch.equal(caches[0].flatten(0, 1)[slots], k)
    assert torch.equal(caches[1].flatten(0, 1)[slots], v)


def test_names_what_is_wrong():
    k = v = torch.ones(2, 1, 8)
    k_cache, v_cache = torch.zeros(2, 3, 4, 1, 8).unbind()
    for bad in (12, -1):
        with pytest.raises(
            IndexError, match=rf"write_kv: slots\[1\] is {bad}, but the cache has 12 slots"
        ):
            ops.write_kv(k, v, k_cache, v_cache, torch.tensor([0, bad]))
    assert not k_cache.any()
    slots = torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"write_kv: v: expected shape \[2, 1, 8\]"):
        ops.write_kv(k, v[:1], k_cache, v_cache, slots)
    with pytest.raises(ValueError, match=r"write_kv: k_cache: expected bfloat16, got float32"):
        ops.write_kv(k.bfloat16(), v.bfloat16(), k_cache, v_cache, slots)
    with pytest.raises(ValueError, match=r"write_kv: v_cache: expected shape \[3, 4, 1, 8\]"):
        ops.write_kv(k, v, k_cache, v_cache[:2], slots)
