"""RMSNorm on the GPU against plain torch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglite import ops
from sglite.ops import reference
from tests.ops.closeness import DTYPES, assert_close


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=15, deadline=None)
@given(
    rows=st.integers(0, 9),
    width=st.integers(1, 300) | st.sampled_from([64, 1024, 4096]),
    padding=st.integers(0, 3),
    with_residual=st.booleans(),
    weight_offset=st.sampled_from([0.0, 1.0]),
    seed=st.integers(0, 2**31),
)
def test_matches_reference(gpu, dtype, rows, width, padding, with_residual, weight_offset, seed):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(dtype).to(gpu)

    x, weight = draw(rows, width + padding)[:, :width], draw(width)
    residual = draw(rows, width) if with_residual else None
    wide_residual = residual.double() if with_residual else None
    low_residual = residual.clone() if with_residual else None
    options = {"weight_offset": weight_offset}
    exact = reference.rms_norm(x.double(), weight.double(), 1e-5, residual=wide_residual, **options)
    low = reference.rms_norm(x, weight, 1e-5, residual=low_residual, **options)
    actual = torch.full((rows, width), torch.nan, dtype=dtype, device=gpu)
    ops.rms_norm(x, weight, 1e-5, residual=residual, out=actual, **options)
    if rows:
        assert_close(actual, low, exact)
    if with_residual:
        assert torch.equal(residual, low_residual)
