"""On the CPU the fused linear ops are the ops that they are made of, bit for bit."""

import pytest
import torch

from sglite import ops
from tests.ops.closeness import DTYPES

ACTIVATIONS = {
    "silu": ops.silu_and_mul,
    "gelu": ops.gelu_and_mul,
    "gelu_tanh": lambda x: ops.gelu_and_mul(x, "tanh"),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("rows", [0, 1, 20])
@pytest.mark.parametrize("with_bias", [True, False])
def test_same_bits_as_the_parts(dtype, packed, rows, with_bias):
    generator = torch.Generator().manual_seed(rows)

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    x, norm_weight, plain = draw(rows, 48), draw(48), draw(40, 48)
    bias = draw(40) if with_bias else None
    weight = ops.pack_weight(plain) if packed else plain
    normed = ops.rms_norm(x, norm_weight, 1e-5, weight_offset=1.0)
    expected = ops.linear(normed, weight, bias)
    actual = ops.norm_linear(x, norm_weight, 1e-5, weight, bias, weight_offset=1.0)
    assert torch.equal(actual, expected)
    for name, activation in ACTIVATIONS.items():
        wanted = activation(expected)
        assert torch.equal(ops.gated(expected, name), wanted)
        assert torch.equal(ops.gated_linear(normed, weight, bias, activation=name), wanted)
        actual = ops.norm_gated_linear(
            x, norm_weight, 1e-5, weight, bias, activation=name, weight_offset=1.0
        )
        assert torch.equal(actual, wanted)


LAYOUTS = {
    "packed": lambda plain: ops.pack_weight(plain),
    "int8": lambda plain: ops.quantize_weight(plain, ops.QuantizedLayout(8, 96)),
    "int4": lambda plain: ops.quantize_weight(plain, ops.QuantizedLayout(4, 32)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [32, 160, 1024])
def test_gates_at_the_end_give_the_bits_of_the_parts(cpu_path, num_threads, layout, dtype, width):
    """For every way in which rows and panels are taken: one row, pairs, blocks, passes."""
    generator = torch.Generator().manual_seed(width)
    weight = LAYOUTS[layout](torch.randn(2 * width, 96, generator=generator).to(dtype))
    bias = torch.randn(2 * width, generator=generator).to(dtype)
    for rows in (0, 1, 2, 5, 13, 40, 200, 411):
        x = torch.randn(rows, 96, generator=generator).to(dtype)
        both = ops.linear(x, weight, bias)
        for name, activation in ACTIVATIONS.items() if rows == 5 else [("silu", ops.silu_and_mul)]:
            actual = ops.gated_linear(x, weight, bias, activation=name)
            assert actual.shape == (rows, width)
            assert torch.equal(actual, activation(both)), (rows, name)
    x = torch.randn(2, 3, 96, generator=generator).to(dtype)
    assert torch.equal(
        ops.gated_linear(x, weight, activation="silu"), ops.gated(ops.linear(x, weight), "silu")
    )


def test_an_unknown_activation_is_refused_by_name():
    weight = ops.pack_weight(torch.randn(64, 8))
    with pytest.raises(ValueError, match="linear: activation: expected .silu., .gelu. or"):
        ops.gated_linear(torch.randn(2, 8), weight, activation="relu")
    with pytest.raises(ValueError, match="gated: activation: expected 'silu', 'gelu' or"):
        ops.gated(torch.randn(2, 8), "relu")
