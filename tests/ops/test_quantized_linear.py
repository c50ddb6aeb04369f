"""Quantised weights: codes in and out, the linear op and the embedding over them, their bits."""

import dataclasses
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglite import _C, ops
from sglite.ops import QuantizedLayout, QuantizedRows, QuantizedWeight, reference
from tests.ops.closeness import DTYPES, assert_close


def draw_rows(generator, n, k, layout):
    """Codes over the whole range, scales of both signs, zero points where there are some."""
    half = 1 << (layout.bits - 1)
    groups = layout.num_groups(k)
    codes = torch.randint(-half, half, (n, k), generator=generator).to(torch.int8)
    scales = (torch.randn(n, groups, generator=generator) / half).to(layout.scale_dtype)
    if not layout.has_zeros:
        return QuantizedRows(codes, scales)
    zeros = torch.randint(-half, half, (n, groups), generator=generator).to(torch.int8)
    return QuantizedRows(codes, scales, zeros)


def numbers(rows, layout):
    """What the rows stand for, element by element, in float64."""
    n, k = rows.codes.shape
    weight = torch.zeros(n, k, dtype=torch.float64)
    for column in range(k):
        group = column // layout.group_size
        zero = 0 if rows.zeros is None else rows.zeros[:, group].double()
        weight[:, column] = (rows.codes[:, column].double() - zero) * rows.scales[:, group].double()
    return weight


def make(generator, n, k, layout, dtype):
    rows = draw_rows(generator, n, k, layout)
    weight = QuantizedWeight.empty(n, k, layout, dtype)
    weight.write_rows(0, rows)
    return weight, numbers(rows, layout)


LAYOUTS = st.builds(
    QuantizedLayout,
    bits=st.sampled_from([4, 8]),
    group_size=st.sampled_from([8, 32, 40, 64, 128, 256, 10_000]),
    has_zeros=st.booleans(),
    scale_dtype=st.sampled_from(DTYPES),
)


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 40),
    n=st.integers(1, 140),
    k=st.integers(1, 600),
    padding=st.integers(0, 3),
    layout=LAYOUTS,
    with_bias=st.booleans(),
    with_residual=st.booleans(),
    to_float32=st.booleans(),
    path=st.sampled_from(_C.available_cpu_paths()),
    seed=st.integers(0, 2**31),
)
def test_linear_matches_reference(
    dtype, rows, n, k, padding, layout, with_bias, with_residual, to_float32, path, seed
):
    generator = torch.Generator().manual_seed(seed)
    out_dtype = torch.float32 if to_float32 else dtype
    x = torch.randn(rows, k + padding, generator=generator).to(dtype)[:, :k]
    weight, exact_weight = make(generator, n, k, layout, dtype)
    bias = torch.randn(n, generator=generator).to(dtype) if with_bias else None
    residual = None
    if with_residual:
        residual = torch.randn(rows, n + padding, generator=generator).to(out_dtype)[:, :n]
    before = _C.cpu_path()
    _C.select_cpu_path(path)
    try:
        actual = ops.linear(x, weight, bias, residual=residual, out_dtype=out_dtype)
    finally:
        _C.select_cpu_path(before)
    assert actual.shape == (rows, n)
    if not rows:
        return
    wide = None if bias is None else bias.double()
    exact = reference.linear(x.double(), exact_weight, wide)
    exact = exact if residual is None else exact + residual.double()
    low = reference.linear(x, exact_weight.to(dtype), bias, residual=residual, out_dtype=out_dtype)
    # Zero points are taken off a sum of products with codes, which may be larger than the result.
    size = x.double().abs() @ (
        weight.scales.double().abs().amax() * (1 << weight.layout.bits) * torch.ones(k, n).double()
    )
    floor = torch.finfo(torch.float32).eps * size.max() / exact.abs().max().clamp(min=1e-30)
    assert_close(actual, low, exact, 16 + float(floor) / torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [32, 128, 100_000])
@pytest.mark.parametrize("has_zeros", [False, True])
def test_a_row_keeps_its_bits_whatever_surrounds_it(
    cpu_path, two_threads, dtype, bits, group_size, has_zeros
):
    """With products that cancel, so that a change of order changes the result."""
    n, k = 130, 1536
    generator = torch.Generator().manual_seed(bits)
    half = draw_rows(
        generator, n, k // 2, QuantizedLayout(bits, min(group_size, k // 2), has_zeros)
    )
    top = (1 << (bits - 1)) - 1
    codes = torch.cat([half.codes, -half.codes.clamp(min=-top)], -1)
    layout = QuantizedLayout(bits, group_size, has_zeros)
    scales = torch.cat([half.scales, half.scales * 1.001], -1)[:, : layout.num_groups(k)]
    zeros = half.zeros
    if has_zeros:
        zeros = torch.cat([half.zeros, half.zeros], -1)[:, : layout.num_groups(k)]
    weight = QuantizedWeight.empty(n, k, layout, dtype)
    weight.write_rows(0, QuantizedRows(codes, scales, zeros))
    x = torch.randn(230, k // 2, generator=generator).to(dtype)
    x = torch.cat([x, x], -1)
    alone = torch.cat([ops.linear(row, weight) for row in x.split(1)])
    for count in (*range(2, 15), 24, 25, 96, 230):
        assert torch.equal(ops.linear(x[-count:], weight), alone[-count:]), count


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", [1, 7, 50])
def test_threads_do_not_change_bits(cpu_path, bits, rows):
    generator = torch.Generator().manual_seed(rows)
    layout = QuantizedLayout(bits, 64, True, torch.bfloat16)
    weight, _ = make(generator, 800, 704, layout, torch.bfloat16)
    x = torch.randn(rows, 704, generator=generator).bfloat16()
    results = []
    for threads in (1, 2, 3):
        _C.set_num_threads(threads)
        results.append(ops.linear(x, weight))
    _C.set_num_threads(0)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 100),
    k=st.integers(1, 300),
    layout=LAYOUTS,
    cut=st.floats(0, 1),
    path=st.sampled_from(_C.available_cpu_paths()),
    seed=st.integers(0, 2**31),
)
def test_reads_back_what_the_codes_stand_for(dtype, n, k, layout, cut, path, seed):
    """Written in two parts whose border may be in a panel; rounded once, from float32."""
    generator = torch.Generator().manual_seed(seed)
    rows = draw_rows(generator, n, k, layout)
    weight = QuantizedWeight.empty(n, k, layout, dtype)
    border = int(cut * n)
    zeros = [None, None] if rows.zeros is None else [rows.zeros[:border], rows.zeros[border:]]
    before = _C.cpu_path()
    _C.select_cpu_path(path)
    try:
        weight.write_rows(
            border, QuantizedRows(rows.codes[border:], rows.scales[border:], zeros[1])
        )
        # Codes may come from a checkpoint that has them by columns.
        weight.write_rows(
            0, QuantizedRows(rows.codes[:border].T.clone().T, rows.scales[:border], zeros[0])
        )
        expected = numbers(rows, layout).float().to(dtype)
        assert torch.equal(weight.unpack(), expected)
        assert torch.equal(weight.read_rows(border, n), expected[border:])
        ids = torch.randint(0, n, (7,), generator=generator)
        assert torch.equal(ops.embedding(ids, weight), expected[ids])
    finally:
        _C.select_cpu_path(before)
    assert torch.equal(rows.dequantize(layout.group_size), numbers(rows, layout).float())


def test_columns_in_another_order():
    generator = torch.Generator().manual_seed(0)
    layout = QuantizedLayout(4, 32)
    order = torch.randperm(96, generator=generator)
    stored = draw_rows(generator, 50, 96, layout)
    weight = QuantizedWeight.empty(50, 96, layout, torch.float32, order)
    weight.write_rows(0, stored)
    expected = torch.empty(50, 96)
    expected[:, order] = stored.dequantize(32)
    assert torch.equal(weight.unpack(), expected)
    assert torch.equal(ops.embedding(torch.tensor([3, 49]), weight), expected[[3, 49]])
    x = torch.randn(5, 96, generator=generator)
    torch.testing.assert_close(ops.linear(x, weight), x @ expected.T)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("k", "group_size"), [(256, 64), (150, 32), (70, 1000)])
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
def test_quantising_rounds_to_the_nearest_code(cpu_path, dtype, bits, k, group_size, scale_dtype):
    rows = torch.randn(37, k).to(dtype)
    rows[3] = 0
    layout = QuantizedLayout(bits, group_size, scale_dtype=scale_dtype)
    weight = ops.quantize_weight(rows, layout)
    expected = QuantizedWeight.empty(37, k, layout, dtype)
    expected.write_rows(0, reference.quantize_rows(rows, layout))
    assert torch.equal(weight.codes, expected.codes)
    assert torch.equal(weight.scales, expected.scales)
    error = (numbers(reference.quantize_rows(rows, layout), layout) - rows.double()).abs()
    # A scale that is rounded moves every code, and so may put the largest out of reach.
    rounding = 0 if scale_dtype == torch.float32 else torch.finfo(scale_dtype).eps
    for group in range(layout.num_groups(k)):
        part = slice(group * group_size, (group + 1) * group_size)
        largest = rows[:, part].double().abs().amax(1, keepdim=True)
        room = largest * rounding
        if bits == 8:
            assert (error[:, part] <= largest / 127 / 2 * 1.01 + room).all()
        else:  # the code 8 of what is as large as the largest, on the other side, is not there
            near = rows[:, part].double().abs() <= largest * 7.5 / 8
            assert (error[:, part] <= largest / 8 * (1.01 - 0.5 * near) + room).all()
    assert torch.equal(weight.unpack()[3], torch.zeros(k, dtype=dtype))
    assert weight.unpack().dtype == dtype


def test_errors_name_what_is_wrong():
    layout = QuantizedLayout(8, 64)
    weight = ops.quantize_weight(torch.randn(10, 128), layout)
    x = torch.randn(2, 128)
    for arguments, message in [
        ((x[:, :100], weight), "x: expected 128 columns"),
        ((x.int(), weight), "x: expected"),
        ((x, weight, torch.zeros(11)), r"bias: expected shape \[10\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            ops.linear(*arguments)
    with pytest.raises(IndexError, match="got 10 at position 1"):
        ops.embedding(torch.tensor([0, 10]), weight)
    for bad, message in [
        ({"bits": 3}, "codes of 3 bits"),
        ({"group_size": 36}, "group size 36"),
        ({"group_size": 264}, "group size 264"),
        ({"scale_dtype": torch.float64}, "scales of torch.float64"),
    ]:
        with pytest.raises(ValueError, match=re.escape(message)):
            QuantizedWeight.empty(10, 300, dataclasses.replace(layout, **bad), torch.float32)
    with pytest.raises(ValueError, match="rows 5 to 15 of a weight with 10 rows"):
        weight.write_rows(5, reference.quantize_rows(torch.randn(10, 128), layout))
