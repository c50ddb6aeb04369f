"""The linear kernel for few rows on the GPU: against plain torch, and bits that must not change."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglite import ops
from sglite.ops import reference
from tests.ops.closeness import assert_close

HALVES = [torch.bfloat16, torch.float16]
NORM = {"epsilon": 1e-5, "weight_offset": 1.0}


def draw(generator, *shape, dtype, scale=1.0):
    return (torch.randn(shape, generator=generator) * scale).to(dtype)


def to(device, *tensors):
    return [None if tensor is None else tensor.to(device) for tensor in tensors]


@pytest.mark.parametrize("dtype", HALVES)
@settings(max_examples=12, deadline=None)
@given(
    rows=st.integers(0, 20) | st.sampled_from([33, 64, 65]),
    n=st.integers(1, 70),
    k=st.integers(1, 24).map(lambda eights: 8 * eights) | st.sampled_from([1032, 1536]),
    padding=st.sampled_from([0, 8]),
    with_bias=st.booleans(),
    with_residual=st.booleans(),
    to_float32=st.booleans(),
    in_segments=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_matches_reference(
    gpu, dtype, rows, n, k, padding, with_bias, with_residual, to_float32, in_segments, seed
):
    generator = torch.Generator().manual_seed(seed)
    out_dtype = torch.float32 if to_float32 else dtype
    x = draw(generator, rows, k + padding, dtype=dtype)[:, :k]
    weight = draw(generator, n, k + padding, dtype=dtype)[:, :k]
    bias = draw(generator, n, dtype=dtype) if with_bias else None
    residual = draw(generator, rows, n + padding, dtype=out_dtype)[:, :n] if with_residual else None
    x, weight, bias, residual = to(gpu, x, weight, bias, residual)
    stored = weight.split([n // 3, n - n // 3]) if in_segments else weight
    out = torch.full((rows, n + 3), torch.nan, dtype=out_dtype, device=gpu)
    actual = ops.linear(x, stored, bias, residual=residual, out=out[:, :n], batch_invariant=True)
    assert out[:, n:].isnan().all()
    if rows:
        exact = reference.linear(
            x.double(), weight.double(), None if bias is None else bias.double()
        )
        exact = exact if residual is None else exact + residual.double()
        low = reference.linear(x, weight, bias, residual=residual, out_dtype=out_dtype)
        assert_close(actual, low, exact, roundings=32)


@pytest.mark.parametrize(("n", "k"), [(72, 1160), (2088, 64), (6152, 72), (8200, 64), (40, 4096)])
def test_a_row_keeps_its_bits_whatever_surrounds_it(gpu, n, k):
    generator = torch.Generator().manual_seed(n)
    half = torch.randn(n, k // 2, generator=generator)
    x = torch.randn(80, k // 2, generator=generator)
    noise = torch.randn(n, k, generator=generator) * 1e-3
    # Products that cancel, so that another order changes the result.
    x = torch.cat([x, x], -1).bfloat16().to(gpu)
    weight = (torch.cat([half, -half], -1) + noise).bfloat16().to(gpu)
    whole = ops.linear(x, weight, out_dtype=torch.float32, batch_invariant=True)
    for rows in (1, 5, 8, 9, 16, 17, 40, 64, 65):
        part = ops.linear(x[80 - rows :], weight, out_dtype=torch.float32, batch_invariant=True)
        assert torch.equal(part, whole[80 - rows :])


@pytest.mark.parametrize("dtype", HALVES)
@settings(max_examples=10, deadline=None)
@given(
    rows=st.integers(1, 5) | st.sampled_from([9, 16, 17, 65]),
    n=st.integers(1, 40),
    k=st.integers(1, 20).map(lambda eights: 8 * eights) | st.sampled_from([1032, 2112]),
    with_bias=st.booleans(),
    activation=st.sampled_from([None, "silu", "gelu", "gelu_tanh"]),
    seed=st.integers(0, 2**31),
)
def test_fused_gives_the_bits_of_the_parts(gpu, dtype, rows, n, k, with_bias, activation, seed):
    generator = torch.Generator().manual_seed(seed)
    weight_rows = n if activation is None else 2 * n
    x, norm_weight = draw(generator, rows, k, dtype=dtype), draw(generator, k, dtype=dtype)
    weight = draw(generator, weight_rows, k, dtype=dtype, scale=k**-0.5)
    bias = draw(generator, weight_rows, dtype=dtype) if with_bias else None
    x, norm_weight, weight, bias = to(gpu, x, norm_weight, weight, bias)
    invariant = {"batch_invariant": True}
    normed = ops.rms_norm(x, norm_weight, **NORM)
    expected = ops.linear(normed, weight, bias, **invariant)
    if activation is None:
        actual = ops.norm_linear(x, norm_weight, weight=weight, bias=bias, **NORM, **invariant)
    else:
        expected = ops.gated(expected, activation)
        plain = ops.gated_linear(normed, weight, bias, activation=activation, **invariant)
        assert torch.equal(plain, expected)
        actual = ops.norm_gated_linear(
            x, norm_weight, weight=weight, bias=bias, activation=activation, **NORM, **invariant
        )
    assert torch.equal(actual, expected)


def test_what_the_kernel_does_not_take(gpu):
    x, weight = torch.randn(2, 16, device=gpu), torch.randn(3, 16, device=gpu)
    with pytest.raises(ValueError, match="multiples of 16 bytes"):
        ops.linear(x, weight, batch_invariant=True)
    x, weight = x.bfloat16(), weight.bfloat16()
    with pytest.raises(ValueError, match="multiples of 16 bytes"):
        ops.linear(x[:, 1:9], weight[:, 1:9], batch_invariant=True)
    with pytest.raises(ValueError, match=r"bias: expected shape \[3\], got bfloat16\[4\]"):
        ops.linear(x, weight, x.new_zeros(4), batch_invariant=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU: uses cuBLAS")
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("rows", [1, 16, 40, 100])
@pytest.mark.parametrize("k", [512, 50])
def test_every_path_of_the_layer(gpu, dtype, rows, k):
    """Kernel or torch, by shape and dtype: the same result within rounding."""
    generator = torch.Generator().manual_seed(rows)
    x, weight = draw(generator, rows, k, dtype=dtype), draw(generator, 96, k, dtype=dtype)
    bias, residual = draw(generator, 96, dtype=dtype), draw(generator, rows, 96, dtype=dtype)
    wide = reference.linear(x.double(), weight.double(), bias.double()) + residual.double()
    low = reference.linear(x, weight, bias, residual=residual)
    arguments = to(gpu, x, weight, bias)
    for stored in (arguments[1], arguments[1].split([32, 64])):
        actual = ops.linear(arguments[0], stored, arguments[2], residual=residual.to(gpu))
        assert_close(actual.cpu(), low, wide, roundings=64)
    logits = ops.linear(*arguments, out_dtype=torch.float32)
    wide = reference.linear(x.double(), weight.double(), bias.double())
    assert_close(logits.cpu(), wide.float(), wide, roundings=64)
