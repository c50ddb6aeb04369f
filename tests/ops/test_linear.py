"""The linear op and packed weights against plain torch, and the bits that must not change."""

import re
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglite import _C, ops
from sglite.ops import reference
from tests.ops.closeness import DTYPES, assert_close


def draw(generator, *shape, dtype):
    return torch.randn(shape, generator=generator).to(dtype)


def cancelling(generator, rows, n, k, dtype):
    """Rows and weights whose products cancel, so that a change of order changes the result."""
    half = torch.randn(n, k // 2, generator=generator)
    x = torch.randn(rows, k // 2, generator=generator)
    noise = torch.randn(n, k, generator=generator) * 1e-3
    return torch.cat([x, x], -1).to(dtype), (torch.cat([half, -half], -1) + noise).to(dtype)


def exact(x, weight, bias, residual=None):
    """The result in float64; the residual is added to what is rounded to float32 at most."""
    y = reference.linear(x.double(), weight.double(), None if bias is None else bias.double())
    return y if residual is None else y + residual.double()


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 40),
    n=st.integers(1, 140),
    k=st.integers(1, 200),
    padding=st.integers(0, 3),
    with_bias=st.booleans(),
    with_residual=st.booleans(),
    to_float32=st.booleans(),
    storage=st.sampled_from(["packed", "plain", "segments"]),
    path=st.sampled_from(_C.available_cpu_paths()),
    seed=st.integers(0, 2**31),
)
def test_matches_reference(
    dtype, rows, n, k, padding, with_bias, with_residual, to_float32, storage, path, seed
):
    generator = torch.Generator().manual_seed(seed)
    out_dtype = torch.float32 if to_float32 else dtype
    x = draw(generator, rows, k + padding, dtype=dtype)[:, :k]
    weight = draw(generator, n, k + padding, dtype=dtype)[:, :k]
    bias = draw(generator, n, dtype=dtype) if with_bias else None
    residual = draw(generator, rows, n + padding, dtype=out_dtype)[:, :n] if with_residual else None
    given_weight = {
        "packed": lambda: ops.pack_weight(weight),
        "plain": lambda: weight,
        "segments": lambda: weight.split([n // 3, n - n // 3]),
    }[storage]()
    before = _C.cpu_path()
    _C.select_cpu_path(path)
    try:
        actual = ops.linear(x, given_weight, bias, residual=residual, out_dtype=out_dtype)
    finally:
        _C.select_cpu_path(before)
    assert actual.shape == (rows, n)
    if rows:
        low = reference.linear(x, weight, bias, residual=residual, out_dtype=out_dtype)
        assert_close(actual, low, exact(x, weight, bias, residual))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "n", "k"),
    [(1, 1, 1), (1, 33, 577), (2, 64, 1), (7, 96, 1030), (13, 200, 333), (200, 70, 640)],
)
def test_every_path_matches_reference(cpu_path, two_threads, dtype, rows, n, k):
    generator = torch.Generator().manual_seed(rows)
    x = draw(generator, rows, k, dtype=dtype)
    weight, bias = draw(generator, n, k, dtype=dtype), draw(generator, n, dtype=dtype)
    low, wide = reference.linear(x, weight, bias), exact(x, weight, bias)
    assert_close(ops.linear(x, ops.pack_weight(weight), bias), low, wide)
    assert_close(ops.linear(x, weight, bias), low, wide)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), [(96, 3072), (130, 577)])
@pytest.mark.parametrize("make", [cancelling, None])
def test_a_row_keeps_its_bits_whatever_surrounds_it(cpu_path, two_threads, dtype, n, k, make):
    k -= k % 2 if make else 0
    generator = torch.Generator().manual_seed(0)
    if make:
        x, weight = make(generator, 230, n, k, dtype)
    else:
        x, weight = (draw(generator, size, k, dtype=dtype) for size in (230, n))
    packed = ops.pack_weight(weight)
    alone = torch.cat([ops.linear(row, packed) for row in x.split(1)])
    for count in (*range(2, 15), 24, 25, 96, 230):
        for storage in (packed, weight, weight.split([5, 59, n - 64])):
            together = ops.linear(x[-count:], storage)
            assert torch.equal(together, alone[-count:]), (count, type(storage))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), [(5, 1), (33, 300), (700, 130)])
def test_every_number_of_rows_gives_the_bits_of_one(cpu_path, two_threads, dtype, n, k):
    """Every cut of the rows into blocks and of the panels among threads, passes of any length."""
    generator = torch.Generator().manual_seed(n)
    x, weight = draw(generator, 301, k, dtype=dtype), draw(generator, n, k, dtype=dtype)
    packed = ops.pack_weight(weight)
    alone = torch.cat([ops.linear(row, packed) for row in x.split(1)])
    for count in (*range(2, 41), 77, 152, 193, 301):
        assert torch.equal(ops.linear(x[:count], packed), alone[:count]), count


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 7, 12, 50])
def test_threads_do_not_change_bits(cpu_path, dtype, rows):
    x, weight = cancelling(torch.Generator().manual_seed(rows), rows, 800, 700, dtype)
    packed = ops.pack_weight(weight)
    results = []
    for threads in (1, 2, 3):
        _C.set_num_threads(threads)
        results.append(ops.linear(x, packed))
    _C.set_num_threads(0)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 5, 30])
@pytest.mark.parametrize("n", [64, 77])
def test_fused_residual_has_the_bits_of_two_ops(cpu_path, dtype, rows, n):
    generator = torch.Generator().manual_seed(n)
    x, weight = draw(generator, rows, 130, dtype=dtype), draw(generator, n, 130, dtype=dtype)
    bias, residual = draw(generator, n, dtype=dtype), draw(generator, rows, n, dtype=dtype) * 8
    packed = ops.pack_weight(weight)
    expected = ops.linear(x, packed, bias) + residual
    assert torch.equal(ops.linear(x, packed, bias, residual=residual), expected)
    assert ops.linear(x, packed, bias, residual=residual, out=residual) is residual
    assert torch.equal(residual, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_result_is_the_unrounded_one(cpu_path, dtype):
    generator = torch.Generator().manual_seed(1)
    x, weight = draw(generator, 9, 256, dtype=dtype), draw(generator, 40, 256, dtype=dtype)
    wide = ops.linear(x, weight, out_dtype=torch.float32)
    assert wide.dtype == torch.float32
    assert torch.equal(wide.to(dtype), ops.linear(x, weight))
    assert (wide.double() - exact(x, weight, None)).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("side", ["x", "weight"])
def test_every_16_bit_number_is_read_exactly(cpu_path, dtype, side):
    numbers = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    if dtype == torch.bfloat16 and cpu_path in ("amx", "avx512"):
        # Their instructions take these for zero.
        subnormal = numbers.float().abs() < torch.finfo(dtype).smallest_normal
        numbers = torch.where(subnormal, torch.zeros_like(numbers), numbers)
    one = torch.ones(1, 1, dtype=dtype)
    operands = (numbers[:, None], one) if side == "x" else (one, numbers[:, None])
    actual = ops.linear(*operands, out_dtype=torch.float32).flatten()
    assert torch.equal(actual.isnan(), numbers.isnan())
    assert torch.equal(actual.nan_to_num(nan=0.0), numbers.float().nan_to_num(nan=0.0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_matrices_in_every_blocking(cpu_path, two_threads, dtype):
    """Several row groups, several pieces of a plain panel, an odd number of panels."""
    generator = torch.Generator().manual_seed(2)
    x, weight = draw(generator, 600, 4500, dtype=dtype), draw(generator, 33, 4500, dtype=dtype)
    low, wide = reference.linear(x, weight), exact(x, weight, None)
    packed = ops.linear(x, ops.pack_weight(weight))
    assert_close(packed, low, wide, roundings=64)
    assert torch.equal(ops.linear(x, weight), packed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 20])
def test_nan_and_infinity_stay_in_their_row_and_column(cpu_path, dtype, rows):
    generator = torch.Generator().manual_seed(3)
    n, k = 45, 33
    x, weight = draw(generator, rows, k, dtype=dtype), draw(generator, n, k, dtype=dtype)
    weight[7, 32], weight[44, 0] = float("nan"), float("inf")
    x[-1, 32] = float("inf")
    for storage in (weight, ops.pack_weight(weight)):
        actual = ops.linear(x, storage)
        assert torch.equal(actual.isnan(), reference.linear(x, weight).isnan())
        assert actual[:, 7].isnan().all()
        assert not actual[:-1, :7].isnan().any()
        assert actual[-1, :7].isinf().all()


def test_leading_dimensions_and_empty_batches(cpu_path):
    weight = torch.randn(20, 12)
    x = torch.randn(3, 5, 12)
    expected = ops.linear(x.view(15, 12), weight).view(3, 5, 20)
    assert torch.equal(ops.linear(x, weight), expected)
    assert torch.equal(ops.linear(x[1, 2], weight), expected[1, 2])
    assert torch.equal(ops.linear(x[:, 1:2], weight), expected[:, 1:2])
    assert ops.linear(x[:0], weight).shape == (0, 5, 20)
    out = torch.zeros(15, 24)
    ops.linear(x.view(15, 12), weight, out=out[:, 2:22])
    assert torch.equal(out[:, 2:22], expected.view(15, 20))
    assert not out[:, :2].any()
    assert not out[:, 22:].any()


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 150),
    k=st.integers(1, 90),
    cuts=st.lists(st.floats(0, 1), max_size=4),
    path=st.sampled_from(_C.available_cpu_paths()),
    seed=st.integers(0, 2**31),
)
def test_packing_in_pieces_reads_back_bit_for_bit(dtype, n, k, cuts, path, seed):
    generator = torch.Generator().manual_seed(seed)
    integer = torch.int32 if dtype == torch.float32 else torch.int16
    limits = torch.iinfo(integer)
    bits = torch.randint(limits.min, limits.max, (n, k), generator=generator, dtype=integer)
    weight = bits.view(dtype)  # NaN of every kind among them
    borders = [0, *sorted(int(cut * n) for cut in cuts), n]
    before = _C.cpu_path()
    _C.select_cpu_path(path)
    try:
        packed = ops.PackedWeight.empty(n, k, dtype)
        for start, stop in pairwise(borders):
            packed.write_rows(start, weight[start:stop])
        assert torch.equal(packed.unpack().view(integer), bits)
        for start, stop in pairwise(borders):
            assert torch.equal(packed.read_rows(start, stop).view(integer), bits[start:stop])
        whole = ops.pack_weight(weight)
    finally:
        _C.select_cpu_path(before)
    assert torch.equal(whole.storage.view(integer), packed.storage.view(integer))


@pytest.mark.parametrize("dtype", DTYPES)
def test_layout_is_panels_of_32_columns(cpu_path, dtype):
    weight = torch.arange(1, 40 * 5 + 1).view(40, 5).to(dtype)
    packed = ops.pack_weight(weight)
    assert packed.shape == (40, 5)
    depth = 1 if dtype == torch.float32 else 2
    padded = torch.zeros(64, 6 if depth == 2 else 5, dtype=dtype)
    padded[:40, :5] = weight
    expected = padded.view(2, 32, -1, depth).transpose(1, 2).reshape(packed.storage.shape)
    assert torch.equal(packed.storage, expected)


def error(message):
    return pytest.raises(ValueError, match="^" + re.escape(message))


def test_names_the_argument_and_what_is_allowed():
    x, weight = torch.randn(3, 16), torch.randn(8, 16)
    with error("linear: x: expected the weight's dtype, bfloat16, got float32[3, 16]"):
        ops.linear(x, weight.bfloat16())
    with error("linear: x: expected the weight's dtype, bfloat16, got float32[3, 16]"):
        ops.linear(x, ops.pack_weight(weight.bfloat16()))
    with error("linear: x: expected 16 columns, got float32[3, 15]"):
        ops.linear(x[:, :15], weight)
    with error("linear: x: expected 16 columns, got float32[3, 15]"):
        ops.linear(x[:, :15], ops.pack_weight(weight))
    with error("linear: x: expected rows without gaps"):
        ops.linear(x.T, torch.randn(8, 3))
    with error("linear: x: expected rows that are evenly apart"):
        ops.linear(torch.randn(3, 4, 16)[:, :2], weight)
    with error("linear: bias: expected shape [8], got float32[7]"):
        ops.linear(x, weight, torch.randn(7))
    with error("linear: residual: expected the leading dimensions of x and 8 columns"):
        ops.linear(x, weight, residual=torch.randn(3, 7))
    with error("linear: residual: expected float32, got bfloat16[3, 8]"):
        ops.linear(x, weight, residual=torch.randn(3, 8).bfloat16())
    with error("linear: out: expected the leading dimensions of x and 8 columns"):
        ops.linear(x, weight, out=torch.empty(2, 8))
    with error("linear: out: expected bfloat16, got float16[3, 8]"):
        ops.linear(x.bfloat16(), weight.bfloat16(), out_dtype=torch.float16)
    with error("linear: out: expected torch.float32 (out_dtype), got torch.bfloat16"):
        ops.linear(x, weight, out_dtype=torch.float32, out=torch.empty(3, 8).bfloat16())
    with error("linear: weight: expected shape [any, 16], got float32[8, 15]"):
        ops.linear(x, [weight, weight[:, :15]])
    with error("linear: weight: expected 1 to 16 tensors, got 17"):
        ops.linear(x, [weight] * 17)
    with error("PackedWeight: rows 4 to 12 of a weight with 8 rows"):
        ops.pack_weight(weight).write_rows(4, weight)
    with error("PackedWeight: rows: expected shape [any, 16], got float32[8, 15]"):
        ops.pack_weight(weight).write_rows(0, weight[:, :15])
    with error("PackedWeight: rows: expected bfloat16, got float32[8, 16]"):
        ops.PackedWeight.empty(8, 16, torch.bfloat16).write_rows(0, weight)
    with error("PackedWeight.read_rows: expected 0 <= start <= stop <= 8, got start=4, stop=9"):
        ops.pack_weight(weight).read_rows(4, 9)
    with error("PackedWeight: dtype: expected float32, bfloat16 or float16, got torch.int8"):
        ops.PackedWeight.empty(8, 16, torch.int8)
    with error("PackedWeight: expected n and k of 1 or more, got n=0, k=16"):
        ops.PackedWeight.empty(0, 16, torch.float32)
    with error("PackedWeight: storage: expected shape [1, 16, 32] for a weight [8, 16]"):
        ops.PackedWeight(torch.empty(8, 16), 8, 16)
