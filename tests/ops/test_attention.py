"""Paged attention against plain torch and Hugging Face, and its promise of same bits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward
from transformers.models.gpt_oss.modeling_gpt_oss import (
    eager_attention_forward as sinks_attention_forward,
)

from sglite import _C, ops
from sglite.ops import reference
from tests.ops.closeness import DTYPES, assert_close
from tests.ops.paged import Sequences

HEAD_DIMS = [1, 7, 16, 24, 32, 64, 80, 112, 128]


def to_double(arguments):
    return [a.double() if a.is_floating_point() else a for a in arguments]


def largest_score(q, k_cache, scale):
    """Return the largest `|q . k * scale|` of any query and key that share a head."""
    grouped = q.unflatten(1, (k_cache.shape[2], -1))
    return (torch.einsum("thgd,pshd->hgtps", grouped, k_cache) * scale).abs().max().item()


def check_close(arguments, scale, **options):
    """Compares with dense attention in float64, measured by Hugging Face's rounding.

    The softmax turns the rounding of a score, relative to the score, into one relative to the
    weight: a score of 40 may cost 40 roundings.
    """
    actual = ops.paged_attention(*arguments, scale, **options)
    # Plain torch multiplies weights of 0 by what unwritten slots hold.
    q, k_cache, v_cache, *rest = arguments
    arguments = (q, k_cache.nan_to_num(), v_cache.nan_to_num(), *rest)
    arguments[3][arguments[3] < 0] = 0
    low = reference.paged_attention(*arguments, scale, **options)
    wide = to_double(arguments)
    exact = reference.paged_attention(*wide, scale, **options)
    assert_close(actual, low, exact, roundings=16 + largest_score(*wide[:2], scale))


@st.composite
def ragged_batches(draw, most_positions=300):
    """Lengths of sequences, and a span of each: whole, a chunk with what came before, a decode."""
    spans = []
    for r in range(draw(st.integers(1, 5))):
        length = draw(st.integers(1, most_positions))
        kind = draw(st.sampled_from(["whole", "chunk", "decode"]))
        start = {"whole": 0, "decode": length - 1}.get(kind)
        spans.append((r, draw(st.integers(0, length - 1)) if start is None else start, length))
    return spans


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=20, deadline=None)
@given(
    spans=ragged_batches(),
    kv_heads=st.integers(1, 3),
    group=st.sampled_from([1, 2, 3, 4, 7]),
    head_dim=st.sampled_from(HEAD_DIMS),
    page_size=st.sampled_from([1, 3, 16, 64]),
    window=st.none() | st.integers(1, 300),
    soft_cap=st.none() | st.sampled_from([2.0, 30.0]),
    scale=st.sampled_from([None, 1.0]),
    has_sinks=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_matches_reference(
    dtype, spans, kv_heads, group, head_dim, page_size, window, soft_cap, scale, has_sinks, seed
):
    generator = torch.Generator().manual_seed(seed)
    lengths = [stop for _, _, stop in spans]
    sequences = Sequences.draw(lengths, kv_heads * group, kv_heads, head_dim, dtype, generator)
    arguments = sequences.batch(spans, page_size, generator)
    scale = head_dim**-0.5 if scale is None else scale
    sinks = 3 * torch.randn(kv_heads * group, generator=generator) if has_sinks else None
    check_close(arguments, scale, window=window, soft_cap=soft_cap, sinks=sinks)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sinks_are_hugging_faces(cpu_path, two_threads, dtype):
    """Also of a sequence that several splits share, and where a sink outweighs all keys."""
    length, q_heads, kv_heads, scale = 1100, 6, 2, 0.125
    generator = torch.Generator().manual_seed(0)
    sequences = Sequences.draw([length], q_heads, kv_heads, 64, dtype, generator)
    visible = torch.ones(length, length).tril().bool()

    class Module:
        num_key_value_groups = q_heads // kv_heads
        training = False
        sinks = torch.tensor([-1.0, 0.0, 2.0, 5.0, 9.0, 80.0])

    def eager(cast):
        q, k, v = (
            cast(t[0]).transpose(0, 1)[None] for t in (sequences.q, sequences.k, sequences.v)
        )
        mask = torch.zeros(length, length, dtype=q.dtype).masked_fill(~visible, -torch.inf)
        return sinks_attention_forward(Module, q, k, v, mask[None, None], scaling=scale)[0][0]

    arguments = sequences.batch([(0, 0, length)], 16, generator)
    actual = ops.paged_attention(*arguments, scale, sinks=Module.sinks)
    assert_close(actual, eager(lambda t: t), eager(lambda t: t.float()))
    decode = sequences.batch([(0, length - 1, length)], 16, generator)
    assert torch.equal(ops.paged_attention(*decode, scale, sinks=Module.sinks)[0], actual[-1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [80, 256])
def test_every_path_matches_hugging_face(cpu_path, two_threads, dtype, head_dim):
    length, q_heads, kv_heads, scale, soft_cap, window = 700, 6, 2, 0.1, 20.0, 300
    generator = torch.Generator().manual_seed(0)
    sequences = Sequences.draw([length], q_heads, kv_heads, head_dim, dtype, generator)
    position = torch.arange(length)
    visible = (position <= position[:, None]) & (position > position[:, None] - window)

    class Module:
        num_key_value_groups = q_heads // kv_heads
        training = False

    def eager(cast):
        q, k, v = (
            cast(t[0]).transpose(0, 1)[None] for t in (sequences.q, sequences.k, sequences.v)
        )
        mask = torch.zeros(length, length, dtype=q.dtype).masked_fill(~visible, -torch.inf)
        return eager_attention_forward(
            Module, q, k, v, mask[None, None], scaling=scale, softcap=soft_cap
        )[0][0]

    actual = ops.paged_attention(
        *sequences.batch([(0, 0, length)], 16, generator), scale, window=window, soft_cap=soft_cap
    )
    assert_close(actual, eager(lambda t: t), eager(lambda t: t.float()))


def test_pictures_see_themselves_both_ways(cpu_path):
    generator = torch.Generator().manual_seed(0)
    sequences = Sequences.draw([90, 300], 4, 2, 64, torch.float32, generator)
    ends = [torch.arange(1, 91), torch.arange(1, 301)]
    ends[0][10:50] = 50
    ends[1][200:290] = 290
    for window in (None, 64):
        check_close(
            sequences.batch([(0, 0, 90), (1, 100, 300)], 16, generator, ends), 0.125, window=window
        )


def test_a_row_that_sees_nothing_gives_zeros(cpu_path, two_threads):
    generator = torch.Generator().manual_seed(0)
    sequences = Sequences.draw([40, 600, 1], 4, 2, 64, torch.float32, generator)
    ends = [torch.arange(1, 41), torch.arange(1, 601), torch.zeros(1, dtype=torch.int64)]
    ends[0][7] = 0
    ends[1][20:599] = 0  # whole blocks of queries
    arguments = sequences.batch([(0, 0, 40), (1, 0, 600), (2, 0, 1)], 16, generator, ends)
    actual = ops.paged_attention(*arguments, 0.125)
    nothing = arguments[-1] == 0
    assert not actual[nothing].any()
    check_close(arguments, 0.125)
    # The window ends before the row's own position, and kv_end before the window.
    ends[0][30] = 10
    arguments = sequences.batch([(0, 0, 40)], 16, generator, ends)
    assert not ops.paged_attention(*arguments, 0.125, window=5)[30].any()


def test_takes_and_fills_strided_rows(cpu_path):
    generator = torch.Generator().manual_seed(0)
    sequences = Sequences.draw([70], 4, 2, 64, torch.bfloat16, generator)
    q, *rest = sequences.batch([(0, 0, 70)], 16, generator)
    expected = ops.paged_attention(q, *rest, 0.125)
    fused = torch.cat([q, q + 1], 1)
    out = torch.zeros(70, 9, 64, dtype=torch.bfloat16)
    given_back = ops.paged_attention(fused[:, :4], *rest, 0.125, out=out[:, 5:])
    assert given_back.data_ptr() == out[:, 5:].data_ptr()
    assert torch.equal(out[:, 5:], expected)
    assert not out[:, :5].any()


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_same_bits_however_the_work_is_cut(dtype, data):
    """One row alone, in a chunk, in a batch, over other pages: the same bits."""
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    lengths = data.draw(st.lists(st.integers(1, 700), min_size=1, max_size=3))
    kv_heads, group = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 9))
    head_dim = data.draw(st.sampled_from(HEAD_DIMS[1:]))
    sequences = Sequences.draw(
        lengths, kv_heads * group, kv_heads, head_dim, dtype, generator, treacherous=True
    )
    options = {
        "scale": data.draw(st.sampled_from([0.05, 1.0])),
        "window": data.draw(st.none() | st.integers(1, 400)),
        "soft_cap": data.draw(st.none() | st.just(10.0)),
    }
    whole = []
    for r, length in enumerate(lengths):
        whole.append(
            ops.paged_attention(*sequences.batch([(r, 0, length)], 16, generator), **options)
        )
        assert torch.isfinite(whole[-1]).all()
    # Steps that advance every sequence by a chunk of its own, some by one token.
    done = [0] * len(lengths)
    while any(d < length for d, length in zip(done, lengths, strict=True)):
        spans = []
        for r, length in enumerate(lengths):
            if done[r] == length:
                continue
            step = data.draw(st.sampled_from([1, 1, 5, 32, 100, 256, 700]))
            spans.append((r, done[r], min(done[r] + step, length)))
            done[r] = spans[-1][2]
            if step == 1:  # not seven hundred times
                done[r] = min(done[r] + data.draw(st.integers(0, 300)), length)
        page_size = data.draw(st.sampled_from([1, 5, 16, 64]))
        arguments = sequences.batch(spans, page_size, generator)
        rows = ops.paged_attention(*arguments, **options).split(
            [stop - start for _, start, stop in spans]
        )
        for actual, (r, start, stop) in zip(rows, spans, strict=True):
            assert torch.equal(actual, whole[r][start:stop])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("group", "head_dim", "window"),
    [
        (1, 80, None),
        (2, 128, 100),
        (3, 64, None),
        (3, 64, 20),
        (3, 128, 100),
        (4, 24, None),
        (5, 48, 70),
        (6, 96, None),
    ],
)
def test_same_bits_on_every_path(cpu_path, two_threads, dtype, group, head_dim, window):
    """A prefill, all of its rows as decodes, and those together in one batch."""
    generator = torch.Generator().manual_seed(1)
    length, kv_heads = 530, 2
    sequences = Sequences.draw(
        [length], kv_heads * group, kv_heads, head_dim, dtype, generator, treacherous=True
    )
    options = {"scale": 0.3, "window": window}
    whole = ops.paged_attention(*sequences.batch([(0, 0, length)], 16, generator), **options)
    spans = [(0, i, i + 1) for i in range(3, length, 37)] + [(0, length - 1, length)]
    together = ops.paged_attention(*sequences.batch(spans, 16, generator), **options)
    for row, span in zip(together, spans, strict=True):
        alone = ops.paged_attention(*sequences.batch([span], 8, generator), **options)
        assert torch.equal(alone[0], whole[span[1]])
        assert torch.equal(row, whole[span[1]])


def test_same_bits_for_any_number_of_threads(cpu_path):
    generator = torch.Generator().manual_seed(2)
    sequences = Sequences.draw([3000, 40], 6, 2, 64, torch.bfloat16, generator, treacherous=True)
    for spans in ([(0, 2999, 3000)], [(0, 2990, 3000), (1, 39, 40)], [(0, 2000, 3000), (1, 0, 40)]):
        arguments = sequences.batch(spans, 16, generator)
        results = []
        for count in (1, 2, 3, 7, 16):
            _C.set_num_threads(count)
            results.append(ops.paged_attention(*arguments, 0.3))
        _C.set_num_threads(0)
        for result in results[1:]:
            assert torch.equal(result, results[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("lengths", "common", "group", "page_size"),
    [
        ([1100, 1025, 1500, 1200], 1024, 3, 16),
        ([700] * 70, 600, 3, 16),  # more than fit one unit
        ([513, 512, 514, 1300], 512, 1, 64),  # one ends with the shared split, another before
        ([1040, 1300, 1030, 1200, 20], 1029, 2, 7),  # a page lies across the border
        ([1600, 1700], 1600, 9, 16),
    ],
)
def test_shared_pages_give_the_bits_of_own_pages(
    cpu_path, two_threads, dtype, lengths, common, group, page_size
):
    kv_heads, head_dim = 2, 32
    generator = torch.Generator().manual_seed(4)
    sequences = Sequences.draw(
        lengths, kv_heads * group, kv_heads, head_dim, dtype, generator, treacherous=True
    )
    for tensors in (sequences.k, sequences.v):
        longest = max(tensors, key=len)
        for tensor in tensors:
            shared = min(common, len(tensor))
            tensor[:shared] = longest[:shared]
    spans = [(r, length - 1, length) for r, length in enumerate(lengths)]
    q, k_cache, v_cache, own, *rest = sequences.batch(spans, page_size, generator)
    pages = common // page_size
    whole = own.clone()
    whole[:, :pages] = own[0, :pages]
    # All share a first part, and some of them more.
    some = whole.clone()
    some[2:, 512 // page_size : pages] = own[2:, 512 // page_size : pages]
    for window in (None, 300):
        expected = ops.paged_attention(q, k_cache, v_cache, own, *rest, 0.3, window=window)
        for table in (whole, some):
            actual = ops.paged_attention(q, k_cache, v_cache, table, *rest, 0.3, window=window)
            assert torch.equal(actual, expected)


def test_later_rows_do_not_touch_earlier_ones(cpu_path):
    """NaN at a position reaches the rows that see it, all of them and no other."""
    generator = torch.Generator().manual_seed(3)
    sequences = Sequences.draw([300], 4, 2, 64, torch.bfloat16, generator)
    clean = ops.paged_attention(*sequences.batch([(0, 0, 300)], 16, generator), 0.125)
    for tensors in (sequences.k, sequences.v):
        kept = tensors[0][97].clone()
        tensors[0][97] = torch.nan
        actual = ops.paged_attention(*sequences.batch([(0, 0, 300)], 16, generator), 0.125)
        assert torch.equal(actual[:97], clean[:97])
        assert actual[97:].isnan().all()
        windowed = ops.paged_attention(
            *sequences.batch([(0, 0, 300)], 16, generator), 0.125, window=50
        )
        assert windowed[97:147].isnan().all()
        assert torch.isfinite(windowed[147:]).all()
        tensors[0][97] = kept


def test_nothing_to_do():
    generator = torch.Generator().manual_seed(0)
    sequences = Sequences.draw([20], 2, 1, 8, torch.float32, generator)
    q, k_cache, v_cache, table, *_ = sequences.batch([(0, 0, 20)], 16, generator)
    none = torch.zeros(0, dtype=torch.int32)
    start = torch.zeros(1, dtype=torch.int32)
    actual = ops.paged_attention(q[:0], k_cache, v_cache, table[:0], start, none, none, 1.0)
    assert actual.shape == (0, 2, 8)
    # A request without tokens between two others.
    arguments = list(sequences.batch([(0, 3, 9), (0, 19, 20)], 16, generator))
    expected = ops.paged_attention(*arguments, 1.0)
    arguments[3] = arguments[3][[0, 0, 1]]
    arguments[4] = torch.tensor([0, 6, 6, 7], dtype=torch.int32)
    arguments[5] = torch.tensor([9, 4, 20], dtype=torch.int32)
    assert torch.equal(ops.paged_attention(*arguments, 1.0), expected)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("page_table", lambda t: t.fill_(99), r"page_table\[0\]\[0\] is 99, but the cache has 5"),
        ("kv_lens", lambda t: t.fill_(3), r"kv_lens\[0\] is 3, but request 0 has 20 tokens"),
        ("kv_lens", lambda t: t.fill_(64), r"kv_lens\[0\] is 64, .* room for 48"),
        ("kv_end", lambda t: t.fill_(21), r"kv_end\[0\] is 21, but request 0 has 20 positions"),
        ("kv_end", lambda t: t.fill_(-1), r"kv_end\[0\] is -1, but request 0 has 20 positions"),
        ("query_start", lambda t: t.fill_(0), r"query_start\[1\] is 0, but it must rise .* the 20"),
        ("kv_end", lambda t: t.long(), r"kv_end: expected int32, got int64\[20\]"),
        ("q", lambda t: t.bfloat16(), r"out|k_cache: expected bfloat16"),
        ("v_cache", lambda t: t[:1], r"v_cache: expected shape \[5, 16, 1, 8\]"),
        ("q", lambda t: t[..., :7], r"k_cache: expected shape \[any, any, any, 7\]"),
    ],
)
def test_names_what_is_wrong(name, change, message):
    generator = torch.Generator().manual_seed(0)
    sequences = Sequences.draw([20], 2, 1, 8, torch.float32, generator)
    names = ["q", "k_cache", "v_cache", "page_table", "query_start", "kv_lens", "kv_end"]
    arguments = dict(zip(names, sequences.batch([(0, 0, 20)], 16, generator), strict=True))
    arguments["k_cache"], arguments["v_cache"] = torch.zeros(2, 5, 16, 1, 8).unbind()
    ops.paged_attention(**arguments, scale=1.0)
    arguments[name] = change(arguments[name])
    with pytest.raises(ValueError, match=rf"paged_attention: .*{message}"):
        ops.paged_attention(**arguments, scale=1.0)


def test_refuses_impossible_options():
    generator = torch.Generator().manual_seed(0)
    sequences = Sequences.draw([20], 3, 2, 8, torch.float32, generator)
    arguments = sequences.batch([(0, 0, 20)], 16, generator)
    with pytest.raises(ValueError, match="expected a multiple of the KV heads in q"):
        ops.paged_attention(*arguments, 1.0)
    with pytest.raises(ValueError, match="expected a multiple of the KV heads in q"):
        ops.paged_attention(arguments[0][:, :0], *arguments[1:], 1.0)
    arguments = (arguments[0][:, :2].contiguous(), *arguments[1:])
    for options in ({"window": 0}, {"soft_cap": 0.0}, {"soft_cap": float("nan")}):
        with pytest.raises(ValueError, match=f"{next(iter(options))}: expected"):
            ops.paged_attention(*arguments, 1.0, **options)
    with pytest.raises(ValueError, match="scale: expected a finite number"):
        ops.paged_attention(*arguments, float("inf"))
