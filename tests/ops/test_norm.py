"""RMSNorm against plain torch and Hugging Face."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from sglite import ops
from sglite.ops import reference
from tests.ops.closeness import DTYPES, assert_close


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
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

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
