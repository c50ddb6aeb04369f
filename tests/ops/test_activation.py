"""Gated activations and the cap on logits against plain torch."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglite import ops
from sglite.ops import reference
from tests.ops.closeness import DTYPES, assert_close

ACTIVATIONS = [
    pytest.param(ops.silu_and_mul, reference.silu_and_mul, (), id="silu"),
    pytest.param(ops.gelu_and_mul, reference.gelu_and_mul, ("none",), id="gelu"),
    pytest.param(ops.gelu_and_mul, reference.gelu_and_mul, ("tanh",), id="gelu_tanh"),
]


def gelu_tanh(x):
    return x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))


#: By the options above. They keep their accuracy in the tails, unlike torch's own GELU.
FORMULAS = {
    (): torch.nn.functional.silu,
    ("none",): lambda x: x * torch.erfc(-x / math.sqrt(2)) / 2,
    ("tanh",): gelu_tanh,
}


@pytest.mark.parametrize(("kernel", "plain", "options"), ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=25, deadline=None)
@given(
    shape=st.lists(st.integers(0, 9), min_size=0, max_size=2),
    width=st.integers(1, 200),
    padding=st.integers(0, 3),
    scale=st.sampled_from([0.01, 1.0, 6.0]),
    seed=st.integers(0, 2**31),
)
def test_matches_reference(kernel, plain, options, dtype, shape, width, padding, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    columns = 2 * width + (padding if len(shape) == 1 else 0)
    x = (torch.randn(*shape, columns, generator=generator) * scale).to(dtype)[..., : 2 * width]
    actual = kernel(x, *options)
    assert actual.shape == (*shape, width)
    if actual.numel():
        exact = FORMULAS[options](x[..., :width].double()) * x[..., width:].double()
        assert_close(actual, plain(x, *options), exact)


@pytest.mark.parametrize(("kernel", "plain", "options"), ACTIVATIONS)
def test_every_path_is_accurate_everywhere(cpu_path, num_threads, kernel, plain, options):
    gate = torch.cat([torch.linspace(-30, 30, 40001), torch.logspace(-30, 4, 3001)])
    gate = torch.cat([gate, -torch.logspace(-30, 1, 3000)]).view(46002 // 6, 6)
    actual = kernel(torch.cat([gate, torch.ones_like(gate)], 1), *options)
    exact = FORMULAS[options](gate.double())
    # The exponential's argument carries a rounding that grows with it.
    tolerance = 4e-7 * (1 + gate.double().square()) * exact.abs()
    assert ((actual - exact).abs() <= tolerance + 1e-35).all()


@pytest.mark.parametrize(("kernel", "plain", "options"), ACTIVATIONS)
def test_a_row_does_not_depend_on_its_neighbours(cpu_path, kernel, plain, options):
    x = torch.randn(64, 2 * 1536, dtype=torch.bfloat16)
    together = kernel(x, *options)
    for row in (0, 7, 63):
        assert torch.equal(kernel(x[row : row + 1], *options)[0], together[row])


def test_nan_stays_nan(cpu_path):
    x = torch.tensor([[float("nan"), 1.0, 1.0, 1.0]])
    for actual in (ops.silu_and_mul(x), ops.gelu_and_mul(x), ops.gelu_and_mul(x, "tanh")):
        assert actual.isnan().tolist() == [[True, False]]


def test_writes_where_asked():
    x, out = torch.randn(3, 8), torch.empty(3, 4)
    assert ops.silu_and_mul(x, out=out) is out
    torch.testing.assert_close(out, reference.silu_and_mul(x))


def test_names_what_is_wrong():
    with pytest.raises(ValueError, match=r"silu_and_mul: x: expected an even number of columns"):
        ops.silu_and_mul(torch.randn(3, 7))
    with pytest.raises(ValueError, match=r"silu_and_mul: out: expected shape \[3, 4\]"):
        ops.silu_and_mul(torch.randn(3, 8), out=torch.empty(3, 8))
    with pytest.raises(ValueError, match=r'gelu_and_mul: approximate: .*got "quick"'):
        ops.gelu_and_mul(torch.randn(3, 8), "quick")


class TestSoftCap:
    @pytest.mark.parametrize("cap", [0.7, 30.0])
    def test_is_tanh_to_the_last_bits(self, cap):
        steps = torch.linspace(-12, 12, 24_001)
        x = cap * torch.cat([steps, steps * 1e-6, torch.tensor([0.0, 1e30, torch.inf, -torch.inf])])
        exact = reference.soft_cap(x.double(), cap)
        error = (ops.soft_cap(x, cap) - exact).abs()
        assert (error <= 2**-21 * exact.abs()).all()

    def test_nan_stays(self):
        assert ops.soft_cap(torch.tensor([torch.nan]), 5.0).isnan().all()

    def test_the_input_stays_as_it_is(self):
        x = torch.randn(5)
        before = x.clone()
        ops.soft_cap(x, 2.0)
        assert torch.equal(x, before)

    def test_the_same_bits_wherever_an_element_lies(self, num_threads):
        x = 50 * torch.randn(7, 33_333)
        whole = ops.soft_cap(x, 30.0)
        for rows in (slice(0, 1), slice(3, 4), slice(2, 7)):
            assert torch.equal(ops.soft_cap(x[rows].clone(), 30.0), whole[rows])
        assert torch.equal(ops.soft_cap(x[:, 5:8].clone(), 30.0), whole[:, 5:8])
