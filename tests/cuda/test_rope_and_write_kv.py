"""The fused kernel in front of attention, against the kernels it stands for and plain torch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglite import ops
from sglite.ops import reference
from tests.ops.closeness import DTYPES, assert_close
from tests.ops.fused_rope import Case, by_parts, cases
from tests.ops.test_rope import make_table


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_gives_the_bits_of_its_parts(gpu, dtype, data):
    case = data.draw(cases(dtype, gpu))
    actual = case.run(ops.rope_and_write_kv)
    for fused, separate in zip(actual, case.run(by_parts), strict=True):
        assert torch.equal(fused, separate)
    if case.slots.numel():
        low, exact = case.run(reference.rope_and_write_kv), case.in_float32()
        for fused, rounded, wanted in zip(
            actual, low, exact.run(reference.rope_and_write_kv), strict=True
        ):
            assert_close(fused, rounded, wanted)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(64, 64), (128, 64), (80, 32), (256, 256)])
def test_more_heads_than_a_block_takes_at_once(gpu, head_dim, rotary_dim, interleaved):
    torch.manual_seed(0)
    heads, kv_heads, tokens = 140, 4, 2
    case = Case(
        torch.randn(tokens, (heads + 2 * kv_heads) * head_dim + 8, device=gpu).bfloat16()[:, :-8],
        torch.tensor([3, 40], device=gpu),
        make_table(50, rotary_dim).to(gpu),
        tuple(torch.zeros(2, 4, kv_heads, head_dim, device=gpu).bfloat16() for _ in range(2)),
        torch.tensor([6, 1], device=gpu),
        {},
        heads,
        interleaved,
    )
    for fused, separate in zip(case.run(ops.rope_and_write_kv), case.run(by_parts), strict=True):
        assert torch.equal(fused, separate)


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=25, deadline=None)
@given(
    count=st.integers(0, 30) | st.just(700),
    shapes=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 40) | st.just(128)), max_size=5),
    seed=st.integers(0, 2**31),
)
def test_copy_kv_slots(gpu, dtype, count, shapes, seed):
    generator = torch.Generator().manual_seed(seed)
    caches = [
        torch.randn(100, 16, *shape, generator=generator).to(dtype).to(gpu) for shape in shapes
    ]
    sources = torch.randint(0, 1600, (count,), generator=generator).to(gpu)
    destinations = torch.randperm(1600, generator=generator)[:count].to(gpu)
    expected = [cache.clone() for cache in caches]
    reference.copy_kv_slots(expected, sources, destinations)
    ops.copy_kv_slots(caches, sources, destinations)
    for actual, wanted in zip(caches, expected, strict=True):
        assert torch.equal(actual, wanted)


def test_copy_kv_slots_of_many_layers_and_many_slots(gpu):
    caches = list(torch.randn(150, 20, 4, 1, 8, device=gpu).unbind())
    slots = torch.arange(30, device=gpu)
    expected = [cache.clone() for cache in caches]
    reference.copy_kv_slots(expected, slots, slots + 7)  # most of them are both
    ops.copy_kv_slots(caches, slots, slots + 7)
    for actual, wanted in zip(caches, expected, strict=True):
        assert torch.equal(actual, wanted)
    wide = torch.randn(300, 16, 1, 24, device=gpu).bfloat16()
    for count in (3500, 24576, 24577):
        sources = torch.randint(0, 4800, (count,), device=gpu)
        destinations = torch.arange(count, device=gpu) % 4800
        if count <= 3500:
            expected = wide.clone()
            reference.copy_kv_slots([expected], sources, destinations)
            ops.copy_kv_slots([wide], sources, destinations)
            assert torch.equal(wide, expected)
        elif count > 24576:
            with pytest.raises(ValueError, match="copy_kv_slots: expected at most 24576 slots"):
                ops.copy_kv_slots([wide], sources, destinations)
