"""Mixture of experts on the GPU: against plain torch, and the bits of the single ops."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import sglite.ops.experts
from sglite import _C, ops
from sglite.ops import reference
from tests.ops.closeness import assert_close

HALVES = [torch.bfloat16, torch.float16]


def draw(rows, num_experts, top_k, hidden, width, dtype, seed):
    """x, weights, experts, gate_up and down."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    weights, experts = reference.route(3 * normal(rows, num_experts), top_k, normalize=True)
    gate_up = [(normal(2 * width, hidden) / hidden**0.5).to(dtype) for _ in range(num_experts)]
    down = [(normal(hidden, width) / width**0.5).to(dtype) for _ in range(num_experts)]
    return normal(rows, hidden).to(dtype), weights, experts, gate_up, down


def to(device, x, weights, experts, gate_up, down):
    """The same on the GPU."""
    matrices = ([matrix.to(device) for matrix in several] for several in (gate_up, down))
    return x.to(device), weights.to(device), experts.to(device), *matrices


def one_by_one(x, weights, experts, gate_up, down, activation):
    """What each row's experts give, added in ascending order: one row and expert at a time."""
    total = torch.zeros(x.shape, device=x.device)
    for row in range(len(x)):
        for place in experts[row].argsort().tolist():
            expert = int(experts[row, place])
            inner = ops.gated_linear(
                x[row : row + 1], gate_up[expert], activation=activation, batch_invariant=True
            )
            out = ops.linear(inner, down[expert], batch_invariant=True)[0]
            total[row] += out.float() * weights[row, place]
    return total.to(x.dtype)


@pytest.fixture
def only_the_kernel(monkeypatch):
    """Fails where ops of single experts run in its place, and gives it a workspace of NaN."""
    run = _C.mix_experts_cuda

    def check(*args):
        def filled(count):
            return torch.full((count,), 0xFF, dtype=torch.uint8, device=args[0].device)

        assert run(*args[:-1], filled)
        return True

    monkeypatch.setattr(sglite.ops.experts._C, "mix_experts_cuda", check)


@pytest.mark.usefixtures("only_the_kernel")
@pytest.mark.parametrize("dtype", HALVES)
@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    rows=st.integers(0, 6) | st.sampled_from([17, 40]),
    num_experts=st.sampled_from([1, 2, 5, 8, 128]),
    top_k=st.integers(1, 8),
    hidden=st.sampled_from([8, 72, 136]),
    width=st.sampled_from([8, 24, 80]),
    activation=st.sampled_from(["silu", "gelu", "gelu_tanh"]),
    seed=st.integers(0, 2**31),
)
def test_has_the_bits_of_single_ops(
    gpu, dtype, rows, num_experts, top_k, hidden, width, activation, seed
):
    drawn = draw(rows, num_experts, min(top_k, num_experts), hidden, width, dtype, seed)
    on_gpu = to(gpu, *drawn)
    actual = ops.mix_experts(*on_gpu, activation=activation)
    assert torch.equal(actual, one_by_one(*on_gpu, activation))
    if rows:
        x, weights, experts, gate_up, down = drawn
        wide = [[matrix.float() for matrix in several] for several in (gate_up, down)]
        exact = reference.mix_experts(x.float(), weights, experts, *wide, activation=activation)
        low = reference.mix_experts(*drawn, activation=activation)
        assert_close(actual.cpu(), low, exact, roundings=32)


@pytest.mark.usefixtures("only_the_kernel")
def test_all_rows_to_one_expert(gpu):
    drawn = to(gpu, *draw(50, 3, 1, 64, 40, torch.bfloat16, 0))
    x, weights, experts, gate_up, down = drawn
    experts = torch.full_like(experts, 2)
    actual = ops.mix_experts(x, weights, experts, gate_up, down, activation="silu")
    assert torch.equal(actual, one_by_one(x, weights, experts, gate_up, down, "silu"))


@pytest.mark.usefixtures("only_the_kernel")
def test_a_row_keeps_its_bits_whatever_surrounds_it(gpu):
    x, weights, experts, *matrices = to(gpu, *draw(40, 5, 3, 1160, 16, torch.bfloat16, 1))
    whole = ops.mix_experts(x, weights, experts, *matrices, activation="silu")
    for rows in (1, 3, 17):
        own = slice(40 - rows, 40)
        part = ops.mix_experts(x[own], weights[own], experts[own], *matrices, activation="silu")
        assert torch.equal(part, whole[own])


@pytest.mark.parametrize(
    ("hidden", "width", "dtype"),
    [(64, 20, torch.bfloat16), (12, 16, torch.float16), (16, 16, torch.float32)],
)
def test_what_the_kernel_does_not_take(gpu, hidden, width, dtype):
    x, weights, experts, gate_up, down = to(gpu, *draw(3, 4, 2, hidden, width, dtype, 0))
    out = torch.empty_like(x)
    arguments = (out, x, weights, experts, gate_up, down, "silu", lambda count: None)
    assert not _C.mix_experts_cuda(*arguments)


def test_shapes_that_do_not_fit(gpu):
    x, weights, experts, gate_up, down = to(gpu, *draw(3, 4, 2, 16, 8, torch.bfloat16, 0))
    with pytest.raises(ValueError, match=r"gate_up: expected shape \[16, 16\]"):
        ops.mix_experts(x, weights, experts, down, down, activation="silu")
    with pytest.raises(ValueError, match="weights"):
        ops.mix_experts(x, weights[:2], experts, gate_up, down, activation="silu")
    with pytest.raises(ValueError, match="activation"):
        ops.mix_experts(x, weights, experts, gate_up, down, activation="relu")
