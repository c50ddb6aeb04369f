"""RoPE, activations, KV write and embedding on the GPU against plain torch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglite import ops
from sglite.ops import reference
from tests.ops.closeness import DTYPES, assert_close
from tests.ops.test_activation import ACTIVATIONS
from tests.ops.test_rope import make_table


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=15, deadline=None)
@given(
    tokens=st.integers(0, 6),
    heads=st.integers(1, 5),
    kv_heads=st.integers(1, 3),
    head_dim=st.integers(1, 140),
    rotated_share=st.floats(0, 1),
    interleaved=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_rope(gpu, dtype, tokens, heads, kv_heads, head_dim, rotated_share, interleaved, seed):
    generator = torch.Generator().manual_seed(seed)
    rotary_dim = int(head_dim * rotated_share) // 2 * 2
    qkv = torch.randn(tokens, heads + 2 * kv_heads, head_dim, generator=generator).to(dtype).to(gpu)
    positions = torch.randint(0, 50, (tokens,), generator=generator).to(gpu)
    table = make_table(50, rotary_dim).to(gpu)

    def rotate(function, tensor):
        tensor = tensor.clone()
        q, k, _ = tensor.split([heads, kv_heads, kv_heads], 1)
        function(q, k, positions, table, interleaved=interleaved)
        return tensor

    actual = rotate(ops.apply_rope, qkv)
    exact = rotate(reference.apply_rope, qkv.float())
    if dtype == torch.float32:
        assert torch.equal(actual, exact)
    elif tokens:
        assert_close(actual, rotate(reference.apply_rope, qkv), exact)


@pytest.mark.parametrize(("kernel", "plain", "options"), ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=10, deadline=None)
@given(
    rows=st.integers(0, 9),
    width=st.integers(1, 300) | st.sampled_from([256, 3072]),
    padding=st.integers(0, 3),
    scale=st.sampled_from([0.01, 1.0, 6.0]),
    seed=st.integers(0, 2**31),
)
def test_activation(gpu, kernel, plain, options, dtype, rows, width, padding, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(rows, 2 * width + padding, generator=generator) * scale).to(dtype).to(gpu)
    x = x[:, : 2 * width]
    out = torch.full((rows, width), torch.nan, dtype=dtype, device=gpu)
    kernel(x, *options, out=out)
    if rows:
        assert_close(out, plain(x, *options), plain(x.double(), *options))


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=15, deadline=None)
@given(
    tokens=st.integers(0, 40),
    heads=st.integers(1, 4),
    head_dim=st.integers(1, 70) | st.just(128),
    page_size=st.integers(1, 20),
    seed=st.integers(0, 2**31),
)
def test_write_kv(gpu, dtype, tokens, heads, head_dim, page_size, seed):
    generator = torch.Generator().manual_seed(seed)
    pages = -(-tokens // page_size) + 2
    qkv = torch.randn(tokens, 3 * heads, head_dim, generator=generator).to(dtype).to(gpu)
    _, k, v = qkv.chunk(3, 1)
    slots = torch.randperm(pages * page_size, generator=generator)[:tokens].to(gpu)
    shape = (pages, page_size, heads, head_dim)
    caches = [torch.randn(shape, generator=generator).to(dtype).to(gpu) for _ in range(2)]
    expected = [cache.clone() for cache in caches]
    reference.write_kv(k, v, *expected, slots)
    ops.write_kv(k, v, *caches, slots)
    for actual, wanted in zip(caches, expected, strict=True):
        assert torch.equal(actual, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 7, 64, 1000])
def test_embedding(gpu, dtype, width):
    table = torch.randn(50, width, device=gpu).to(dtype)
    ids = torch.tensor([3, 49, 0, 3], device=gpu)
    assert torch.equal(ops.embedding(ids, table), table[ids])
    assert ops.embedding(ids[:0], table).shape == (0, width)
