"""The embedding op: rows by id, from plain and packed tables."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglite import _C, ops
from sglite.ops import reference
from tests.ops.closeness import DTYPES


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 100),
    width=st.integers(1, 70),
    padding=st.integers(0, 2),
    count=st.integers(0, 50),
    path=st.sampled_from(_C.available_cpu_paths()),
    seed=st.integers(0, 2**31),
)
def test_gives_the_rows_asked_for(dtype, rows, width, padding, count, path, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, width + padding, generator=generator).to(dtype)[:, :width]
    ids = torch.randint(rows, (count,), generator=generator)
    packed = ops.pack_weight(weight)
    before = _C.cpu_path()
    _C.select_cpu_path(path)
    try:
        assert torch.equal(ops.embedding(ids, weight), reference.embedding(ids, weight))
        assert torch.equal(ops.embedding(ids, packed), reference.embedding(ids, weight))
    finally:
        _C.select_cpu_path(before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_ids_on_every_path(cpu_path, num_threads, dtype):
    weight = torch.randn(333, 577).to(dtype)
    ids = torch.randint(333, (800,))
    assert torch.equal(ops.embedding(ids, weight), weight[ids])
    assert torch.equal(ops.embedding(ids, ops.pack_weight(weight)), weight[ids])


@pytest.mark.parametrize("bad", [-1, 10, 2**40])
@pytest.mark.parametrize("pack", [ops.pack_weight, lambda weight: weight])
def test_names_an_id_that_is_out_of_range(bad, pack):
    message = (
        rf"embedding: ids: expected ids from 0 to 9 \(the table has 10 rows\), got {bad} "
        "at position 2"
    )
    with pytest.raises(IndexError, match=message):
        ops.embedding(torch.tensor([0, 9, bad]), pack(torch.randn(10, 4)))


def test_names_the_argument():
    weight = torch.randn(10, 4)
    with pytest.raises(ValueError, match=r"embedding: ids: expected int64, got int32\[2\]"):
        ops.embedding(torch.zeros(2, dtype=torch.int32), weight)
    with pytest.raises(ValueError, match="embedding: ids: expected 1 dimensions"):
        ops.embedding(torch.zeros(2, 2, dtype=torch.int64), weight)
    with pytest.raises(ValueError, match="embedding: weight: expected rows without gaps"):
        ops.embedding(torch.zeros(2, dtype=torch.int64), weight.T)
