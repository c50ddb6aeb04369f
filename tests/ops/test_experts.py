"""Mixture of experts against plain torch, row by row."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglite import ops
from sglite.ops import reference
from tests.ops.closeness import DTYPES, assert_close


class TestRoute:
    @pytest.mark.parametrize("normalize", [False, True])
    def test_is_the_definition(self, normalize):
        logits = torch.randn(50, 9)
        weights, experts = ops.route(logits, 4, normalize=normalize)
        for row in range(50):
            probabilities = logits[row].exp() / logits[row].exp().sum()
            wanted = sorted(range(9), key=lambda e: -probabilities[e])[:4]
            assert experts[row].tolist() == wanted
            expected = probabilities[wanted]
            expected = expected / expected.sum() if normalize else expected
            torch.testing.assert_close(weights[row], expected)

    @pytest.mark.parametrize("num_experts", [5, 8, 60, 128])
    def test_a_row_alone_is_the_same_bits(self, num_experts):
        logits = 3 * torch.randn(67, num_experts)
        weights, experts = ops.route(logits, 5, normalize=True)
        for row in range(67):
            alone = ops.route(logits[row : row + 1].clone(), 5, normalize=True)
            assert torch.equal(alone[0][0], weights[row])
            assert torch.equal(alone[1][0], experts[row])


def test_rows_of_experts():
    found = ops.rows_of_experts(torch.tensor([[4, 0], [2, 4], [0, 2]]), 6)
    assert [(e, rows.tolist(), places.tolist()) for e, rows, places in found] == [
        (0, [0, 2], [1, 4]),
        (2, [1, 2], [2, 5]),
        (4, [0, 1], [0, 3]),
    ]
    assert ops.rows_of_experts(torch.empty(0, 2, dtype=torch.int64), 6) == []


def draw(rows, num_experts, top_k, dtype, seed, hidden=24, width=17):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    x = normal(rows, hidden).to(dtype)
    weights, experts = ops.route(normal(rows, num_experts), top_k, normalize=False)
    gate_up = [(normal(2 * width, hidden) / hidden**0.5).to(dtype) for _ in range(num_experts)]
    down = [(normal(hidden, width) / width**0.5).to(dtype) for _ in range(num_experts)]
    return x, weights, experts, gate_up, down


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=15, deadline=None)
@given(
    rows=st.integers(1, 20),
    num_experts=st.integers(1, 7),
    activation=st.sampled_from(["silu", "gelu", "gelu_tanh"]),
    is_packed=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_mix_experts(dtype, rows, num_experts, activation, is_packed, seed):
    x, weights, experts, gate_up, down = draw(rows, num_experts, min(3, num_experts), dtype, seed)
    wide = [[matrix.float() for matrix in matrices] for matrices in (gate_up, down)]
    exact = reference.mix_experts(x.float(), weights, experts, *wide, activation=activation)
    plain = reference.mix_experts(x, weights, experts, gate_up, down, activation=activation)
    if is_packed:
        gate_up, down = ([ops.pack_weight(m) for m in matrices] for matrices in (gate_up, down))
    actual = ops.mix_experts(x, weights, experts, gate_up, down, activation=activation)
    assert_close(actual, plain, exact)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_alone_is_the_same_bits(dtype):
    x, weights, experts, gate_up, down = draw(40, 6, 3, dtype, 0)
    options = {"gate_up": gate_up, "down": down, "activation": "silu"}
    whole = ops.mix_experts(x, weights, experts, **options)
    for row in range(40):
        own = slice(row, row + 1)
        alone = ops.mix_experts(x[own], weights[own], experts[own], **options)
        assert torch.equal(alone, whole[own])


def test_no_rows():
    x, weights, experts, gate_up, down = draw(0, 4, 2, torch.bfloat16, 0)
    out = ops.mix_experts(x, weights, experts, gate_up, down, activation="silu")
    assert (out.shape, out.dtype) == (x.shape, torch.bfloat16)
