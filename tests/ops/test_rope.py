"""RoPE against plain torch and Hugging Face."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.glm.modeling_glm import apply_rotary_pos_emb as glm_rope
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as llama_rope

from sglite import ops
from sglite.ops import reference
from tests.ops.closeness import DTYPES, assert_close


def make_table(positions: int, rotary_dim: int) -> torch.Tensor:
    """[positions, rotary_dim]: cosines, then sines."""
    frequencies = 10000.0 ** -(torch.arange(0, rotary_dim, 2) / rotary_dim)
    angles = torch.arange(positions)[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], -1)


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(0, 40),
    heads=st.integers(1, 5),
    kv_heads=st.integers(1, 3),
    head_dim=st.integers(1, 140),
    rotated_share=st.floats(0, 1),
    interleaved=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_rotates_slices_of_a_fused_projection(
    dtype, tokens, heads, kv_heads, head_dim, rotated_share, interleaved, seed
):
    generator = torch.Generator().manual_seed(seed)
    rotary_dim = int(head_dim * rotated_share) // 2 * 2
    qkv = torch.randn(tokens, heads + 2 * kv_heads, head_dim, generator=generator).to(dtype)
    positions = torch.randint(0, 50, (tokens,), generator=generator)
    table = make_table(50, rotary_dim)

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
    untouched = slice(heads + kv_heads, None)
    assert torch.equal(actual[:, untouched], qkv[:, untouched])
    assert torch.equal(actual[..., rotary_dim:], qkv[..., rotary_dim:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
def test_every_path_matches_hugging_face(cpu_path, num_threads, dtype, interleaved):
    torch.manual_seed(0)
    tokens, rotary_dim = 700, 72  # enough work for two threads, and a tail on every path
    q = torch.randn(tokens, 4, rotary_dim).to(dtype)
    k = torch.randn(tokens, 2, rotary_dim).to(dtype)
    table = make_table(tokens, rotary_dim)
    positions = torch.randperm(tokens)
    cos, sin = (half.repeat(1, 2)[positions] for half in table.chunk(2, -1))
    rope = glm_rope if interleaved else llama_rope
    low = rope(q, k, cos.to(dtype), sin.to(dtype))
    exact = rope(q.float(), k.float(), cos, sin)
    ops.apply_rope(q, k, positions, table, interleaved=interleaved)
    for actual, rounded, wanted in zip((q, k), low, exact, strict=True):
        if dtype == torch.float32:
            assert torch.equal(actual, wanted)
        assert_close(actual, rounded, wanted)


def test_a_row_does_not_depend_on_its_neighbours(cpu_path):
    q, k = torch.randn(64, 4, 80).bfloat16(), torch.randn(64, 2, 80).bfloat16()
    positions, table = torch.arange(64), make_table(64, 80)
    alone_q, alone_k = q[7:8].clone(), k[7:8].clone()
    ops.apply_rope(q, k, positions, table)
    ops.apply_rope(alone_q, alone_k, positions[7:8], table)
    assert torch.equal(alone_q[0], q[7])
    assert torch.equal(alone_k[0], k[7])


def test_names_what_is_wrong():
    q, k, table = torch.randn(3, 2, 16), torch.randn(3, 1, 16), make_table(8, 16)
    before = q.clone()
    for bad in (8, -1):
        with pytest.raises(
            IndexError, match=rf"apply_rope: positions\[1\] is {bad}, but cos_sin has 8 positions"
        ):
            ops.apply_rope(q, k, torch.tensor([0, bad, 1]), table)
    assert torch.equal(q, before)
    positions = torch.arange(3)
    with pytest.raises(ValueError, match=r"apply_rope: k: expected shape \[3, any, 16\]"):
        ops.apply_rope(q, k[:2], positions, table)
    with pytest.raises(ValueError, match=r"apply_rope: cos_sin: expected an even number of col"):
        ops.apply_rope(q, k, positions, make_table(8, 18))
    with pytest.raises(ValueError, match=r"apply_rope: positions: expected int64, got int32"):
        ops.apply_rope(q, k, positions.int(), table)
