"""Decoder layers in one call give the bits of the ops that they are made of."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglite import _C, ops
from tests.ops.closeness import DTYPES
from tests.ops.test_rope import make_table

PAGE_SIZE = 4


def scratch(index, count):
    """Memory that holds NaN, as no op may read what it has not written."""
    return torch.full((count,), 0xFF, dtype=torch.uint8)


def stored(weight, storage):
    """A plain weight as the op takes it: packed, or quantised by this layout."""
    if storage is None:
        return ops.pack_weight(weight)
    return ops.quantize_weight(weight, storage)


def draw_layer(generator, dtype, sizes, with_bias, with_norm, options):
    """The parts of a layer, and its weights in the order of the calls.

    options["storages"]: for each weight how it is stored.
    """
    hidden, heads, kv_heads, head_dim, width = sizes
    weights = []

    def random(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    def linear(n, k):
        bias = random(n) if with_bias else None
        weights.append(stored(random(n, k) / k**0.5, options["storages"][len(weights)]))
        return ops.LinearPart.of(weights[-1], bias)

    norms = (random(head_dim), random(head_dim)) if with_norm else (None, None)
    scale, window, soft_cap = head_dim**-0.5, *options["see"]
    parts = ops.LayerParts(
        ops.NormPart(random(hidden), 1e-5, 1.0),
        linear((heads + 2 * kv_heads) * head_dim, hidden),
        ops.AttentionPart(*norms, 1e-6, 0.0, options["interleaved"], scale, window, soft_cap),
        linear(hidden, heads * head_dim),
        ops.NormPart(random(hidden), 1e-6, 0.0),
        linear(2 * width, hidden),
        options["activation"],
        linear(hidden, width),
    )
    return parts, weights


def run_layer(x, batch, parts, cos_sin, k_cache, v_cache, scratch):
    """One layer."""
    layer = ops.LayerCall(parts, cos_sin, k_cache, v_cache)
    return ops.decoder_layers(x, batch, [layer], scratch)


def by_parts(x, batch, parts, weights, cos_sin, k_cache, v_cache):
    weights = iter(weights)

    def linear(x, part, residual=None):
        return ops.linear(x, next(weights), part.bias, residual=residual)

    def norm(x, part):
        return ops.rms_norm(x, part.weight, part.epsilon, weight_offset=part.weight_offset)

    attention = parts.attention
    q = ops.rope_and_write_kv(
        linear(norm(x, parts.input_norm), parts.qkv),
        batch.positions,
        cos_sin,
        k_cache,
        v_cache,
        batch.slots,
        q_norm=attention.q_norm,
        k_norm=attention.k_norm,
        epsilon=attention.epsilon,
        weight_offset=attention.weight_offset,
        interleaved=attention.interleaved,
    )
    out = ops.paged_attention(
        q,
        k_cache,
        v_cache,
        *batch[2:],
        attention.scale,
        window=attention.window,
        soft_cap=attention.soft_cap,
    )
    middle = linear(out.flatten(1), parts.output, residual=x)
    gated = ops.gated(linear(norm(middle, parts.post_norm), parts.gate_up), parts.activation)
    return linear(gated, parts.down, residual=middle)


def draw_batch(generator, spans):
    """One request for each span of positions; pages in random order."""
    pages = [-(-stop // PAGE_SIZE) for _, stop in spans]
    table = torch.full((len(spans), max(pages)), -7, dtype=torch.int32)
    order = torch.randperm(sum(pages) + 1, generator=generator).int()
    positions, slots, taken = [], [], 0
    for row, (start, stop) in enumerate(spans):
        table[row, : pages[row]] = own = order[taken : taken + pages[row]]
        taken += pages[row]
        position = torch.arange(start, stop)
        positions.append(position)
        slots.append(own[position // PAGE_SIZE].long() * PAGE_SIZE + position % PAGE_SIZE)
    counts = torch.tensor([0] + [stop - start for start, stop in spans])
    positions = torch.cat(positions)
    return ops.LayerBatch(
        positions,
        torch.cat(slots),
        table,
        counts.cumsum(0).int(),
        torch.tensor([stop for _, stop in spans], dtype=torch.int32),
        (positions + 1).int(),
    )


STORAGES = st.sampled_from(
    [
        None,
        ops.QuantizedLayout(8, 1 << 30),
        ops.QuantizedLayout(8, 32, has_zeros=True),
        ops.QuantizedLayout(4, 16, scale_dtype=torch.bfloat16),
    ]
)


@given(data=st.data())
@settings(max_examples=60, deadline=None)
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_as_the_parts(dtype, data):
    draw = data.draw
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    kv_heads, head_dim = draw(st.integers(1, 3)), draw(st.sampled_from([8, 24, 64]))
    heads = kv_heads * draw(st.integers(1, 3))
    sizes = (draw(st.integers(1, 80)), heads, kv_heads, head_dim, draw(st.integers(1, 100)))
    starts = draw(st.lists(st.integers(0, 20), min_size=1, max_size=5))
    spans = [(start, start + draw(st.sampled_from([1, 1, 1, 7]))) for start in starts]
    options = {
        "interleaved": draw(st.booleans()),
        "see": (draw(st.sampled_from([None, 5])), draw(st.sampled_from([None, 20.0]))),
        "activation": draw(st.sampled_from(["silu", "gelu", "gelu_tanh"])),
        "storages": draw(st.lists(STORAGES, min_size=4, max_size=4)),
    }
    bias, norm = draw(st.booleans()), draw(st.booleans())
    parts, weights = draw_layer(generator, dtype, sizes, bias, norm, options)
    batch = draw_batch(generator, spans)
    shape = (sum(-(-stop // PAGE_SIZE) for _, stop in spans) + 1, PAGE_SIZE, kv_heads, head_dim)
    caches = [torch.randn(shape, generator=generator).to(dtype) for _ in range(2)]
    same_caches = [cache.clone() for cache in caches]
    x = torch.randn(len(batch.positions), sizes[0], generator=generator).to(dtype)
    kept = x.clone()
    cos_sin = make_table(40, head_dim)
    rows = draw(st.none() | st.sets(st.integers(0, len(x) - 1)).map(sorted))
    wanted = None if rows is None else torch.tensor(rows, dtype=torch.int64)
    call = ops.LayerCall(parts, cos_sin, *caches)
    actual = ops.decoder_layers(x, batch, [call], scratch, wanted)
    expected = by_parts(x, batch, parts, weights, cos_sin, *same_caches)
    assert torch.equal(actual, expected if rows is None else expected[rows])
    assert all(map(torch.equal, caches, same_caches))
    assert torch.equal(x, kept)


WIDE = (256, 8, 2, 32, 512)


def draw_wide(spans):
    """The arguments of a layer that has work for several threads, and the same by parts."""
    generator = torch.Generator().manual_seed(3)
    options = {"interleaved": False, "see": (None, None), "activation": "silu"}
    options["storages"] = [None, ops.QuantizedLayout(8, 1 << 30), None, None]
    parts, weights = draw_layer(generator, torch.bfloat16, WIDE, False, False, options)
    batch = draw_batch(generator, spans)
    pages = sum(-(-stop // PAGE_SIZE) for _, stop in spans) + 1
    caches = torch.randn(2, pages, PAGE_SIZE, *WIDE[2:4], generator=generator).bfloat16().unbind()
    x = torch.randn(len(batch.positions), WIDE[0], generator=generator).bfloat16()
    table = make_table(1300, WIDE[3])
    same_caches = [cache.clone() for cache in caches]
    expected = by_parts(x, batch, parts, weights, table, *same_caches)
    return [x, batch, parts, table, *caches, scratch], expected


@pytest.fixture
def threads_again():
    yield
    _C.set_num_threads(0)


# One token, whose keys are in splits that are merged; rows for several blocks of every kernel.
@pytest.mark.parametrize("spans", [[(1200, 1201)], [(3, 4)] * 9 + [(0, 50)]])
@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_same_bits_with_a_team_of_any_size(threads_again, count, spans):
    arguments, expected = draw_wide(spans)
    _C.set_num_threads(count)
    for _ in range(20):
        assert torch.equal(run_layer(*arguments), expected)


@pytest.mark.parametrize("num_layers", [2, 3, 6])
def test_layers_take_what_the_one_before_gives(threads_again, num_layers):
    # Layers of different widths, so that each needs another amount of scratch.
    generator = torch.Generator().manual_seed(5)
    options = {"interleaved": False, "see": (None, None), "activation": "silu"}
    options["storages"] = [None] * 4
    batch, table = draw_batch(generator, [(0, 3), (6, 7)]), make_table(40, 16)
    layers, expected_caches, expected = [], [], torch.randn(4, 48, generator=generator)
    x = kept = expected.clone()
    for index in range(num_layers):
        sizes = (48, 2 * (index + 1), index + 1, 16, 300 - 40 * index)
        parts, weights = draw_layer(generator, torch.float32, sizes, True, False, options)
        caches = torch.randn(2, 4, PAGE_SIZE, index + 1, 16, generator=generator).unbind()
        layers.append(ops.LayerCall(parts, table, *(cache.clone() for cache in caches)))
        expected = by_parts(expected, batch, parts, weights, table, *caches)
        expected_caches += caches
    assert torch.equal(ops.decoder_layers(x, batch, layers, scratch), expected)
    # The last layer alone may give fewer rows; it writes all keys and values.
    written_caches = [cache for layer in layers for cache in (layer.k_cache, layer.v_cache)]
    for rows in ([2, 3], [0], []):
        for cache in written_caches:
            cache.flatten(0, 1)[batch.slots] = 0
        given = ops.decoder_layers(x, batch, layers, scratch, torch.tensor(rows).long())
        assert torch.equal(given, expected[rows])
        assert all(map(torch.equal, written_caches, expected_caches))
    assert torch.equal(x, kept)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (torch.tensor([1, 1]), r"rows\[1\] is 1, but they must ascend among the 4 rows of x"),
        (torch.tensor([2, 1]), r"rows\[1\] is 1"),
        (torch.tensor([-1]), r"rows\[0\] is -1"),
        (torch.tensor([3, 4]), r"rows\[1\] is 4"),
        (torch.tensor([0], dtype=torch.int32), "rows: .*int64"),
        (torch.tensor([[0]]), "rows: "),
    ],
)
def test_rows_that_there_are_not_are_refused(arguments, rows, message):
    _, _, *layer, _ = arguments
    x, batch = torch.zeros(4, 16), draw_batch(torch.Generator(), [(0, 4)])
    with pytest.raises(ValueError, match=message):
        ops.decoder_layers(x, batch, [ops.LayerCall(*layer)], scratch, rows)


def tensors_of(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from tensors_of(item)


@pytest.mark.parametrize("storage", [None, ops.QuantizedLayout(8, 32, has_zeros=True)])
def test_kept_layers_see_the_memory_that_their_tensors_have_got_since(storage):
    generator = torch.Generator().manual_seed(7)
    options = {"interleaved": False, "see": (None, None), "activation": "silu"}
    options["storages"] = [storage] * 4
    batch, table = draw_batch(generator, [(0, 3), (6, 7)]), make_table(40, 16)

    def draw_call():
        parts, _ = draw_layer(generator, torch.float32, (48, 2, 1, 16, 64), True, True, options)
        caches = torch.randn(2, 4, PAGE_SIZE, 1, 16, generator=generator).unbind()
        return ops.LayerCall(parts, table, *caches)

    first, second = draw_call(), draw_call()
    x = torch.randn(4, 48, generator=generator)
    layers = ops.LayerCalls([first])
    seen = [ops.decoder_layers(x, batch, layers, scratch) for _ in range(2)]
    assert torch.equal(*seen)
    pairs = list(zip(tensors_of(first), tensors_of(second), strict=True))
    assert len(pairs) == (15 if storage is None else 23)
    for tensor, other in pairs:
        tensor.data = other.clone()
    seen.append(ops.decoder_layers(x, batch, layers, scratch))
    assert torch.equal(seen[-1], ops.decoder_layers(x, batch, [second], scratch))
    assert not torch.equal(seen[-1], seen[0])


def test_views_of_other_layers_are_refused(arguments):
    x, batch, *layer, _ = arguments
    one, other = (ops.LayerCalls([ops.LayerCall(*layer)]) for _ in range(2))
    with pytest.raises(ValueError, match="decoder_layers: views"):
        _C.decoder_layers(torch.empty_like(x), x, batch, one, other.views, scratch, None)


def test_an_error_within_a_team_is_thrown_and_the_next_call_works(threads_again):
    arguments, expected = draw_wide([(7, 30)])
    _C.set_num_threads(2)
    slots = arguments[1].slots
    wrong = arguments[1]._replace(slots=torch.full_like(slots, 1 << 20))
    with pytest.raises(IndexError, match="slots"):
        run_layer(arguments[0], wrong, *arguments[2:])
    assert torch.equal(run_layer(*arguments), expected)


@pytest.fixture
def arguments():
    generator = torch.Generator().manual_seed(0)
    options = {"interleaved": False, "see": (None, None), "activation": "silu"}
    options["storages"] = [None] * 4
    parts, _ = draw_layer(generator, torch.float32, (16, 4, 2, 8, 24), True, False, options)
    caches = torch.zeros(2, 4, PAGE_SIZE, 2, 8).unbind()
    x = torch.randn(1, 16, generator=generator)
    return [x, draw_batch(generator, [(3, 4)]), parts, make_table(40, 8), *caches, scratch]


def test_a_position_without_a_row_changes_nothing(arguments):
    arguments[1] = arguments[1]._replace(positions=torch.tensor([40]))
    with pytest.raises(IndexError, match="positions"):
        run_layer(*arguments)
    assert not arguments[4].any()


def test_a_slot_that_does_not_exist_changes_nothing(arguments):
    arguments[1] = arguments[1]._replace(slots=torch.tensor([16]))
    with pytest.raises(IndexError, match="slots"):
        run_layer(*arguments)
    assert not arguments[4].any()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("qkv", r"decoder_layers: qkv: expected a weight \[64, 16\], got \[64, 17\]"),
        ("output", r"decoder_layers: output: expected a weight \[16, 32\], got \[17, 32\]"),
        ("gate_up", r"decoder_layers: gate_up: expected a weight \[48, 16\], got \[47, 16\]"),
    ],
)
@pytest.mark.parametrize("storage", [None, ops.QuantizedLayout(8, 32)])
def test_weights_that_do_not_fit_each_other_are_refused(arguments, name, message, storage):
    part = getattr(arguments[2], name)
    n, k = {"qkv": (64, 17), "output": (17, 32), "gate_up": (47, 16)}[name]
    weight = ops.LinearPart.of(stored(torch.zeros(n, k), storage), part.bias)
    arguments[2] = arguments[2]._replace(**{name: weight})
    with pytest.raises(ValueError, match=message):
        run_layer(*arguments)


def test_a_weight_whose_columns_are_in_another_order_is_not_taken():
    layout, order = ops.QuantizedLayout(8, 8), torch.randperm(16)
    weight = ops.QuantizedWeight.empty(32, 16, layout, torch.float32, order)
    assert ops.LinearPart.of(weight, None) is None


def test_scratch_that_is_too_small_is_refused(arguments):
    arguments[-1] = lambda index, count: torch.empty(count - 1, dtype=torch.uint8)
    with pytest.raises(ValueError, match="decoder_layers: activations: expected .* bytes"):
        run_layer(*arguments)


def test_an_unknown_activation_is_refused_by_name(arguments):
    arguments[2] = arguments[2]._replace(activation="relu")
    with pytest.raises(ValueError, match='decoder_layers: activation: expected "silu"'):
        run_layer(*arguments)
