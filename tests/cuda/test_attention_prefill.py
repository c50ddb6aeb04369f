"""Attention of many query rows, on Hopper's matrix unit, against plain torch.

The requests are long enough for that kernel; `tests/cuda/test_attention.py` has all the others.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglite import _C, ops
from sglite.ops import reference
from tests.ops.closeness import assert_close
from tests.ops.paged import Sequences

DTYPES = [torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def hopper(gpu):
    if gpu.type != "cuda" or torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU (compute capability 9.0)")
    if "90a" not in _C.cuda_architectures.split(";"):
        pytest.skip("the extension was not built for sm_90a: SGLITE_CUDA_ARCHS=90a")
    return gpu


def run(gpu, arguments, scale, **options):
    """The op on the GPU, into a result that held NaN; the plan must have found prefills."""
    q, k_cache, _, table, *lengths = arguments = [tensor.to(gpu) for tensor in arguments]
    plan = ops.plan_attention(
        table,
        *lengths,
        page_size=k_cache.shape[1],
        num_heads=q.shape[1],
        num_kv_heads=k_cache.shape[2],
        head_dim=q.shape[2],
        window=options.get("window"),
    )
    prefill_tiles = plan.workspace[:16].view(torch.int32)[2]
    assert prefill_tiles > 0
    out = torch.full_like(q, torch.nan)
    return ops.paged_attention(*arguments, scale, plan=plan, out=out, **options)


def check_close(gpu, arguments, scale, **options):
    """Compares with dense attention in float32, measured by torch's own rounding."""
    actual = run(gpu, arguments, scale, **options)
    q, k_cache, v_cache, table, *lengths = [tensor.to(gpu) for tensor in arguments]
    plain = (q, k_cache.nan_to_num(), v_cache.nan_to_num(), table.clamp(min=0), *lengths)
    with torch.device(gpu):
        low = reference.paged_attention(*plain, scale, **options)
        wide = [t.float() if t.is_floating_point() else t for t in plain]
        exact = reference.paged_attention(*wide, scale, **options)
    grouped = wide[0].unflatten(1, (k_cache.shape[2], -1))
    largest = max(
        (head @ keys.mT).abs().max().item() * abs(scale)
        for head, keys in zip(grouped.unbind(1), wide[1].flatten(0, 1).unbind(1), strict=True)
    )
    assert_close(actual, low, exact, roundings=16 + largest)


def enough_tokens(gpu, group, kv_heads, head_dim):
    """So many that a plan gives them to the kernel: its tiles fill half of the processors."""
    tile = (192 if head_dim <= 64 else 128) // group
    processors = torch.cuda.get_device_properties(gpu).multi_processor_count
    return -(-processors // (2 * kv_heads)) * tile


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@settings(max_examples=10, deadline=None)
@given(
    others=st.lists(st.tuples(st.integers(1, 300), st.sampled_from([0, 1, 100, 900])), max_size=3),
    cached=st.sampled_from([0, 1, 500]),
    more=st.integers(0, 300),
    kv_heads=st.sampled_from([2, 3, 8]),
    group=st.sampled_from([1, 3, 4, 7]),
    page_size=st.sampled_from([16, 64]),
    window=st.none() | st.integers(1, 1000),
    soft_cap=st.none() | st.sampled_from([2.0, 30.0]),
    scale=st.sampled_from([None, 1.0, -0.1]),
    seed=st.integers(0, 2**31),
)
def test_matches_reference(
    hopper, dtype, head_dim, others, cached, more, kv_heads, group, page_size, window, soft_cap,
    scale, seed,
):  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    tokens = enough_tokens(hopper, group, kv_heads, head_dim) + more
    lengths = [(tokens, cached), *others]
    spans = [(r, before, before + new) for r, (new, before) in enumerate(lengths)]
    sequences = Sequences.draw(
        [stop for _, _, stop in spans], kv_heads * group, kv_heads, head_dim, dtype, generator
    )
    arguments = sequences.batch(spans, page_size, generator)
    scale = head_dim**-0.5 if scale is None else scale
    check_close(hopper, arguments, scale, window=window, soft_cap=soft_cap)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_long_prompts(hopper, head_dim):
    generator = torch.Generator().manual_seed(0)
    sequences = Sequences.draw([4000, 2500], 8, 2, head_dim, torch.bfloat16, generator)
    arguments = sequences.batch([(0, 0, 4000), (1, 1500, 2500)], 16, generator)
    for window in (None, 700):
        check_close(hopper, arguments, head_dim**-0.5, window=window)


def test_pictures_see_themselves_both_ways(hopper):
    generator = torch.Generator().manual_seed(0)
    sequences = Sequences.draw([290, 900], 32, 8, 64, torch.bfloat16, generator)
    ends = [torch.arange(1, 291), torch.arange(1, 901)]
    ends[0][10:150] = 150
    ends[1][200:490] = 490
    for window in (None, 64):
        arguments = sequences.batch([(0, 0, 290), (1, 100, 900)], 16, generator, ends)
        check_close(hopper, arguments, 0.125, window=window)


def test_a_row_that_sees_nothing_gives_zeros(hopper):
    generator = torch.Generator().manual_seed(0)
    sequences = Sequences.draw([400, 600], 32, 8, 128, torch.bfloat16, generator)
    ends = [torch.arange(1, 401), torch.arange(1, 601)]
    ends[0][7] = 0
    ends[1][20:599] = 0  # whole tiles
    arguments = sequences.batch([(0, 0, 400), (1, 0, 600)], 16, generator, ends)
    actual = run(hopper, arguments, 0.09)
    assert not actual[(arguments[-1] == 0).to(hopper)].any()
    check_close(hopper, arguments, 0.09)


def test_same_bits_however_a_prompt_is_cut(hopper):
    """Blocks of keys start at absolute positions: a tile's other rows do not matter."""
    generator = torch.Generator().manual_seed(1)
    sequences = Sequences.draw([2900, 300], 32, 8, 128, torch.bfloat16, generator, treacherous=True)
    whole = run(hopper, sequences.batch([(0, 0, 2900)], 16, generator), 0.3)
    start = 0
    for stop in (200, 407, 1500, 2900):
        arguments = sequences.batch([(0, start, stop), (1, 0, 300)], 16, generator)
        assert torch.equal(run(hopper, arguments, 0.3)[: stop - start], whole[start:stop])
        start = stop


def test_takes_and_fills_strided_rows(hopper):
    generator = torch.Generator().manual_seed(0)
    sequences = Sequences.draw([570], 32, 8, 64, torch.bfloat16, generator)
    q, *rest = [t.to(hopper) for t in sequences.batch([(0, 0, 570)], 16, generator)]
    expected = run(hopper, (q, *rest), 0.125)
    fused = torch.cat([q, q + 1], 1)
    out = torch.zeros(570, 37, 64, dtype=torch.bfloat16, device=hopper)
    ops.paged_attention(fused[:, :32], *rest, 0.125, out=out[:, 5:])
    assert torch.equal(out[:, 5:], expected)
    assert not out[:, :5].any()


def test_inside_a_graph(hopper):
    """Captured together with its plan, it is right for other lengths in the same tensors."""
    generator = torch.Generator().manual_seed(0)
    sequences = Sequences.draw([500], 32, 8, 128, torch.bfloat16, generator)
    arguments = [t.to(hopper) for t in sequences.batch([(0, 0, 500)], 16, generator)]
    out = torch.empty_like(arguments[0])
    ops.paged_attention(*arguments, 0.09, out=out)  # loads the kernels
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.paged_attention(*arguments, 0.09, out=out)
    expected = run(hopper, arguments, 0.09)
    arguments[6].copy_(torch.arange(1, 501).clamp(max=100))
    changed = run(hopper, arguments, 0.09)
    graph.replay()
    assert torch.equal(out, changed)
    arguments[6].copy_(torch.arange(1, 501))
    graph.replay()
    assert torch.equal(out, expected)
