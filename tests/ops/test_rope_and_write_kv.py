"""Norm, rotation and KV write as one op, against the ops it stands for and plain torch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglite import ops
from sglite.ops import reference
from tests.ops.closeness import DTYPES, assert_close
from tests.ops.fused_rope import by_parts, cases
from tests.ops.test_rope import make_table


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_gives_the_bits_of_its_parts(dtype, data):
    case = data.draw(cases(dtype))
    actual = case.run(ops.rope_and_write_kv)
    for fused, separate in zip(actual, case.run(by_parts), strict=True):
        assert torch.equal(fused, separate)
    if case.slots.numel():
        low, exact = case.run(reference.rope_and_write_kv), case.in_float32()
        for fused, rounded, wanted in zip(
            actual, low, exact.run(reference.rope_and_write_kv), strict=True
        ):
            assert_close(fused, rounded, wanted)


def arguments(tokens=3):
    qkv = torch.randn(tokens, 4 * 16)
    caches = torch.zeros(2, 3, 4, 1, 16)
    return [qkv, torch.arange(tokens), make_table(8, 16), *caches, torch.arange(tokens)]


def test_queries_are_a_view():
    args = arguments()
    q = ops.rope_and_write_kv(*args)
    assert q.shape == (3, 2, 16)
    assert q.data_ptr() == args[0].data_ptr()


@pytest.mark.parametrize(
    ("index", "bad", "message"),
    [
        (1, 8, r"positions\[1\] is 8, but cos_sin has 8 positions"),
        (5, -1, r"slots\[1\] is -1, but the cache has 12 slots"),
        (5, 12, r"slots\[1\] is 12, but the cache has 12 slots"),
    ],
)
def test_indices_that_do_not_exist_change_nothing(index, bad, message):
    args = arguments()
    args[index][1] = bad
    before = args[0].clone()
    with pytest.raises(IndexError, match="rope_and_write_kv: " + message):
        ops.rope_and_write_kv(*args, q_norm=torch.ones(16), k_norm=torch.ones(16))
    assert torch.equal(args[0], before)
    assert not args[3].any()


def test_names_what_is_wrong():
    args = arguments()
    with pytest.raises(ValueError, match="qkv: expected rows of whole heads of 16, 1 of them keys"):
        ops.rope_and_write_kv(args[0][:, :40], *args[1:])
    with pytest.raises(ValueError, match="expected both of q_norm and k_norm"):
        ops.rope_and_write_kv(*args, q_norm=torch.ones(16))
    with pytest.raises(ValueError, match=r"k_norm: expected shape \[16\]"):
        ops.rope_and_write_kv(*args, q_norm=torch.ones(16), k_norm=torch.ones(8))
    with pytest.raises(ValueError, match="k_cache: expected bfloat16, got float32"):
        ops.rope_and_write_kv(args[0].bfloat16(), *args[1:])
    args[2] = make_table(8, 18)
    with pytest.raises(ValueError, match="cos_sin: expected an even number of columns"):
        ops.rope_and_write_kv(*args)
