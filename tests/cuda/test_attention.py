"""Paged attention on the GPU against plain torch, and its promise of same bits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglite import ops
from sglite.ops import reference
from tests.cuda.conftest import IS_EMULATED
from tests.ops.closeness import DTYPES, assert_close
from tests.ops.paged import Sequences
from tests.ops.test_attention import largest_score, ragged_batches, to_double

HALVES = [torch.bfloat16, torch.float16]
# The emulator takes a second for what a GPU does in microseconds, where the reference then takes
# most of the time.
MOST = 250 if IS_EMULATED else 1500
EXAMPLES = 3 if IS_EMULATED else 30
# Of bits. Both are one template, which the comparisons with the reference meet in every type.
ONE_HALF = HALVES[:1] if IS_EMULATED else HALVES


def run(gpu, arguments, scale, **options):
    """The op on the GPU, into a result that held NaN; gives it on the CPU."""
    q, k_cache, _, *batch = arguments = [tensor.to(gpu) for tensor in arguments]
    plan = ops.plan_attention(
        *batch,
        page_size=k_cache.shape[1],
        num_heads=q.shape[1],
        num_kv_heads=k_cache.shape[2],
        head_dim=q.shape[2],
        window=options.get("window"),
        batch_invariant=True,
    )
    if options.get("sinks") is not None:
        options["sinks"] = options["sinks"].to(gpu)
    out = torch.full_like(q, torch.nan)
    return ops.paged_attention(*arguments, scale, plan=plan, out=out, **options).cpu()


def check_close(gpu, arguments, scale, **options):
    """Compares with dense attention in float64, measured by Hugging Face's rounding."""
    actual = run(gpu, arguments, scale, **options)
    q, k_cache, v_cache, table, *rest = arguments
    arguments = (q, k_cache.nan_to_num(), v_cache.nan_to_num(), table.clamp(min=0), *rest)
    low = reference.paged_attention(*arguments, scale, **options)
    wide = to_double(arguments)
    exact = reference.paged_attention(*wide, scale, **options)
    assert_close(actual, low, exact, roundings=16 + largest_score(*wide[:2], scale))


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=EXAMPLES, deadline=None)
@given(
    spans=ragged_batches(MOST),
    kv_heads=st.integers(1, 3),
    group=st.sampled_from([1, 2, 3, 4, 7, 17]),
    head_dim=st.sampled_from([7, 24, 64, 80, 96, 112, 128, 256, 264]),
    page_size=st.sampled_from([1, 3, 16, 64]),
    window=st.none() | st.integers(1, 300),
    soft_cap=st.none() | st.sampled_from([2.0, 30.0]),
    scale=st.sampled_from([None, 1.0]),
    has_sinks=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_matches_reference(
    gpu,
    dtype,
    spans,
    kv_heads,
    group,
    head_dim,
    page_size,
    window,
    soft_cap,
    scale,
    has_sinks,
    seed,
):
    generator = torch.Generator().manual_seed(seed)
    lengths = [stop for _, _, stop in spans]
    sequences = Sequences.draw(lengths, kv_heads * group, kv_heads, head_dim, dtype, generator)
    arguments = sequences.batch(spans, page_size, generator)
    scale = head_dim**-0.5 if scale is None else scale
    sinks = 3 * torch.randn(kv_heads * group, generator=generator) if has_sinks else None
    check_close(gpu, arguments, scale, window=window, soft_cap=soft_cap, sinks=sinks)


@pytest.mark.parametrize("dtype", ONE_HALF)
@pytest.mark.parametrize(
    ("group", "head_dim", "window"), [(4, 128, None), (3, 64, 100), (1, 96, None), (2, 256, None)]
)
def test_same_bits_however_the_work_is_cut(gpu, dtype, group, head_dim, window):
    """A prefill, chunks of it, single rows alone and together with others: the same bits."""
    generator = torch.Generator().manual_seed(1)
    length, kv_heads = 400 if IS_EMULATED else 2900, 2
    sequences = Sequences.draw(
        [length, 40], kv_heads * group, kv_heads, head_dim, dtype, generator, treacherous=True
    )
    options = {"scale": 0.3, "window": window}

    def rows(*spans):
        return run(gpu, sequences.batch(spans, 16, generator), **options)

    whole = rows((0, 0, length))
    assert torch.isfinite(whole).all()
    start = 0
    for stop in (1, 7, 130, length // 2, length):
        assert torch.equal(rows((0, start, stop)), whole[start:stop])
        start = stop
    places = [*range(3, length, 97), length - 1]
    together = rows(*[(0, i, i + 1) for i in places], (1, 0, 40))
    assert torch.equal(together[: len(places)], whole[places])
    for i in places[::2]:
        assert torch.equal(rows((0, i, i + 1)), whole[i : i + 1])
    many = [(0, length - 1, length)] * (3 if IS_EMULATED else 200)
    assert torch.equal(rows(*many), whole[-1:].expand(len(many), -1, -1))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("most", [None, 1])
def test_one_plan_for_all_layers_and_any_lengths(gpu, dtype, most):
    """A plan's tensors keep their addresses while lengths change, as in a captured graph."""
    generator = torch.Generator().manual_seed(2)
    sizes = {"page_size": 16, "num_heads": 4, "num_kv_heads": 2, "head_dim": 64}
    length = 400 if IS_EMULATED else 2000
    sequences = Sequences.draw([length, 40, 1], 4, 2, 64, dtype, generator)
    q, k, v, table, start, lens, end = [
        tensor.to(gpu)
        for tensor in sequences.batch(
            [(0, length - 1, length), (1, 39, 40), (2, 0, 1), (0, 0, 1)], 16, generator
        )
    ]
    count = ops.attention_workspace(4, table.shape, max_query_tokens=most, **sizes)
    workspace = torch.zeros(count, dtype=torch.uint8, device=gpu)
    for lengths in ([length, 40, 1, 1], [length // 2, 17, 1, 0], [3, 0, 0, 1], [0, 0, 0, 0]):
        lens.copy_(torch.tensor(lengths))
        end.copy_(lens)
        plan = ops.plan_attention(
            table, start, lens, end, max_query_tokens=most, workspace=workspace, **sizes
        )
        for layer in range(3):
            query = q.roll(layer, 1)
            out = torch.full_like(q, torch.nan)
            ops.paged_attention(query, k, v, table, start, lens, end, 0.125, plan=plan, out=out)
            arguments = [t.cpu() for t in (query, k, v, table, start, lens, end)]
            arguments[1:4] = *(t.nan_to_num() for t in arguments[1:3]), arguments[3].clamp(min=0)
            if any(lengths):
                exact = reference.paged_attention(*to_double(arguments), 0.125)
                assert_close(out.cpu(), reference.paged_attention(*arguments, 0.125), exact)
            assert not out[lens == 0].any()


def test_a_row_that_sees_nothing_gives_zeros(gpu):
    generator = torch.Generator().manual_seed(0)
    sequences = Sequences.draw([40, 600, 1], 4, 2, 64, torch.bfloat16, generator)
    ends = [torch.arange(1, 41), torch.arange(1, 601), torch.zeros(1, dtype=torch.int64)]
    ends[0][7] = 0
    ends[1][20:599] = 0  # whole blocks of queries
    arguments = sequences.batch([(0, 0, 40), (1, 0, 600), (2, 0, 1)], 16, generator, ends)
    assert not run(gpu, arguments, 0.125)[arguments[-1] == 0].any()
    check_close(gpu, arguments, 0.125)


def test_pictures_see_themselves_both_ways(gpu):
    generator = torch.Generator().manual_seed(0)
    sequences = Sequences.draw([90, 300], 4, 2, 64, torch.float16, generator)
    ends = [torch.arange(1, 91), torch.arange(1, 301)]
    ends[0][10:50] = 50
    ends[1][200:290] = 290
    for window in (None, 64):
        arguments = sequences.batch([(0, 0, 90), (1, 100, 300)], 16, generator, ends)
        check_close(gpu, arguments, 0.125, window=window)


def test_takes_and_fills_strided_rows(gpu):
    generator = torch.Generator().manual_seed(0)
    sequences = Sequences.draw([70], 4, 2, 64, torch.bfloat16, generator)
    q, *rest = [t.to(gpu) for t in sequences.batch([(0, 0, 70)], 16, generator)]
    expected = ops.paged_attention(q, *rest, 0.125)
    fused = torch.cat([q, q + 1], 1)
    out = torch.zeros(70, 9, 64, dtype=torch.bfloat16, device=gpu)
    ops.paged_attention(fused[:, :4], *rest, 0.125, out=out[:, 5:])
    assert torch.equal(out[:, 5:], expected)
    assert not out[:, :5].any()


def test_names_what_is_wrong(gpu):
    generator = torch.Generator().manual_seed(0)
    sequences = Sequences.draw([20], 2, 1, 64, torch.bfloat16, generator)
    arguments = [t.to(gpu) for t in sequences.batch([(0, 0, 20)], 16, generator)]
    sizes = {"page_size": 16, "num_heads": 2, "num_kv_heads": 1, "head_dim": 64}
    plan = ops.plan_attention(*arguments[3:], **sizes)
    with pytest.raises(ValueError, match="plan: made for 2 heads, .* window None, .* and 5"):
        ops.paged_attention(*arguments, 0.125, plan=plan, window=5)
    with pytest.raises(ValueError, match="plan_attention: workspace: expected"):
        ops.plan_attention(*arguments[3:], workspace=plan.workspace[:64], **sizes)
    with pytest.raises(ValueError, match="plan_attention: num_heads: expected a multiple"):
        ops.plan_attention(*arguments[3:], **{**sizes, "num_kv_heads": 3})
    with pytest.raises(ValueError, match="paged_attention: k_cache: expected shape"):
        ops.paged_attention(arguments[0][..., :32], *arguments[1:], 0.125)


@pytest.mark.parametrize("dtype", ONE_HALF)
@pytest.mark.parametrize(("group", "prefix"), [(4, 530), (1, 1100), (8, 256), (2, 255)])
def test_same_bits_over_shared_pages(gpu, dtype, group, prefix):
    """Requests with a common prefix, in the same pages and in pages of their own."""
    generator = torch.Generator().manual_seed(3)
    page_size, kv_heads = 16, 2
    tails = [5, 1, 300, 40, 17, 90] if IS_EMULATED else [5, 1, 300, 40, 17, 90, 900] * 5
    lengths = [prefix + tail for tail in tails] + [30, 700]
    sequences = Sequences.draw(lengths, kv_heads * group, kv_heads, 64, dtype, generator, True)
    for r in range(1, len(tails)):
        sequences.k[r][:prefix] = sequences.k[0][:prefix]
        sequences.v[r][:prefix] = sequences.v[0][:prefix]
    spans = [(r, length - 1, length) for r, length in enumerate(lengths)]
    arguments = sequences.batch(spans, page_size, generator)
    expected = run(gpu, arguments, 0.3)
    table = arguments[3].clone()
    table[1 : len(tails), : prefix // page_size] = table[0, : prefix // page_size]
    shared = (*arguments[:3], table, *arguments[4:])
    assert torch.equal(run(gpu, shared, 0.3), expected)
    sizes = {"num_heads": kv_heads * group, "num_kv_heads": kv_heads, "head_dim": 64}

    def keys(arguments):
        batch = [tensor.to(gpu) for tensor in arguments[3:]]
        plan = ops.plan_attention(*batch, page_size=page_size, max_query_tokens=1, **sizes)
        return plan.workspace[16:20].view(torch.int32).item()  # that units hold

    assert (keys(shared) < keys(arguments)) == (prefix >= 256)
    check_close(gpu, shared, 0.3)
