"""RMSNorm and LayerNorm against plain torch and Hugging Face."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from sglite import ops
from sglite.ops import reference
from tests.ops.closeness import DTYPES, assert_close


def drawing(seed, dtype):
    """Gives tensors of a shape, one after the other."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(0, 70),
    width=st.integers(1, 300),
    padding=st.integers(0, 3),
    with_residual=st.booleans(),
    weight_offset=st.sampled_from([0.0, 1.0]),
    seed=st.integers(0, 2**31),
)
def test_matches_reference(dtype, rows, width, padding, with_residual, weight_offset, seed):
    draw = drawing(seed, dtype)
    x, weight = draw(rows, width + padding)[:, :width], draw(width)
    residual = draw(rows, width) if with_residual else None
    wide_residual = residual.float().clone() if with_residual else None
    low_residual = residual.clone() if with_residual else None
    options = {"weight_offset": weight_offset}
    exact = reference.rms_norm(x.float(), weight.float(), 1e-5, residual=wide_residual, **options)
    low = reference.rms_norm(x, weight, 1e-5, residual=low_residual, **options)
    actual = torch.empty(rows, width, dtype=dtype)
    ops.rms_norm(x, weight, 1e-5, residual=residual, out=actual, **options)
    if rows:
        assert_close(actual, low, exact)
    if with_residual:
        assert torch.equal(residual, low_residual)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_path_matches_hugging_face(cpu_path, num_threads, dtype):
    torch.manual_seed(0)
    x = torch.randn(37, 577).to(dtype)
    module = LlamaRMSNorm(577, eps=1e-6).to(dtype)
    module.weight.data.normal_()
    with torch.no_grad():
        low = module(x)
        exact = module.float()(x.float())
    assert_close(ops.rms_norm(x, module.weight.data.to(dtype), 1e-6), low, exact)


def test_a_row_does_not_depend_on_its_neighbours(cpu_path):
    x = torch.randn(64, 576, dtype=torch.bfloat16)
    weight = torch.randn(576, dtype=torch.bfloat16)
    together = ops.rms_norm(x, weight, 1e-5)
    for row in (0, 7, 63):
        assert torch.equal(ops.rms_norm(x[row : row + 1], weight, 1e-5)[0], together[row])


def test_writes_in_place():
    x = torch.randn(3, 16)
    expected = reference.rms_norm(x, torch.ones(16), 1e-5)
    assert ops.rms_norm(x, torch.ones(16), 1e-5, out=x) is x
    torch.testing.assert_close(x, expected)


def test_names_the_argument_and_the_shape():
    x = torch.randn(3, 16)
    with pytest.raises(
        ValueError, match=r"rms_norm: weight: expected shape \[16\], got float32\[8\]"
    ):
        ops.rms_norm(x, torch.ones(8), 1e-5)
    with pytest.raises(ValueError, match=r"rms_norm: weight: expected float32, got bfloat16\[16\]"):
        ops.rms_norm(x, torch.ones(16, dtype=torch.bfloat16), 1e-5)
    with pytest.raises(ValueError, match=r"rms_norm: x: expected float32 or bfloat16 or float16"):
        ops.rms_norm(x.int(), torch.ones(16, dtype=torch.int32), 1e-5)


class TestLayerNorm:
    @pytest.mark.parametrize("dtype", DTYPES)
    @settings(max_examples=25, deadline=None)
    @given(
        rows=st.integers(0, 70),
        width=st.integers(1, 300),
        padding=st.integers(0, 3),
        with_bias=st.booleans(),
        offset=st.sampled_from([0.0, 30.0]),
        seed=st.integers(0, 2**31),
    )
    def test_matches_reference(self, dtype, rows, width, padding, with_bias, offset, seed):
        draw = drawing(seed, dtype)
        # Far from zero, where a variance of sums of squares would have no digits left.
        x = (draw(rows, width + padding) + offset)[:, :width]
        weight, bias = draw(width), draw(width) if with_bias else None
        wide = None if bias is None else bias.double()
        exact = functional.layer_norm(x.double(), (width,), weight.double(), wide, 1e-5).float()
        low = functional.layer_norm(x, (width,), weight, bias, 1e-5)
        actual = torch.empty(rows, width, dtype=dtype)
        assert ops.layer_norm(x, weight, bias, 1e-5, out=actual) is actual
        if rows:
            assert_close(actual, low, exact)
            assert_close(reference.layer_norm(x, weight, bias, 1e-5), low, exact)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_every_path_is_torchs_and_needs_no_neighbours(self, cpu_path, num_threads, dtype):
        torch.manual_seed(0)
        x, weight, bias = torch.randn(3, 67, 577).to(dtype), *torch.randn(2, 577).to(dtype)
        exact = functional.layer_norm(x.float(), (577,), weight.float(), bias.float())
        together = ops.layer_norm(x, weight, bias, 1e-5)
        assert_close(together, functional.layer_norm(x, (577,), weight, bias), exact)
        for row in (0, 66):
            assert torch.equal(ops.layer_norm(x[1, row], weight, bias, 1e-5), together[1, row])

    def test_rows_in_any_order(self):
        x = torch.randn(5, 7, 16).transpose(0, 1)
        weight, bias = torch.randn(2, 16)
        actual = ops.layer_norm(x, weight, bias, 1e-5)
        assert torch.equal(actual, ops.layer_norm(x.contiguous(), weight, bias, 1e-5))

    def test_names_the_argument(self):
        with pytest.raises(ValueError, match=r"layer_norm: bias: expected shape \[16\]"):
            ops.layer_norm(torch.randn(3, 16), torch.ones(16), torch.ones(8), 1e-5)
