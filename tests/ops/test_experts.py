"""Mixture of experts against plain torch, row by row."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import sglite.ops.experts
from sglite import _C, ops
from sglite.ops import reference
from tests.ops.closeness import DTYPES, assert_close


class TestRoute:
    @pytest.mark.parametrize("normalize", [False, True])
    def test_is_the_definition(self, normalize):
        logits = torch.randn(50, 9)
        weights, experts = ops.route(logits, 4, normalize=normalize)
        for row in range(50):
            probabilities = logits[row].exp() / logits[row].exp().sum()
            wanted = sorted(range(9), key=lambda e: -probabilities[e])[:4]
            assert experts[row].tolist() == wanted
            expected = probabilities[wanted]
            expected = expected / expected.sum() if normalize else expected
            torch.testing.assert_close(weights[row], expected)

    def test_of_equals_the_first_are_taken(self):
        logits = torch.tensor([[1.0, 2.0, 2.0, 0.0, 2.0], [3.0, 3.0, 3.0, 3.0, 3.0]])
        weights, experts = ops.route(logits, 3, normalize=True)
        assert experts.tolist() == [[1, 2, 4], [0, 1, 2]]
        torch.testing.assert_close(weights, torch.full((2, 3), 1 / 3))

    @pytest.mark.parametrize("top_k", [1, 4])
    def test_all_rows_get_experts_that_exist(self, top_k):
        inf, nan = float("inf"), float("nan")
        logits = torch.tensor([[nan] * 4, [-inf, 0, -inf, nan], [-inf] * 4, [inf, 0, inf, 1]])
        _, experts = ops.route(logits, top_k, normalize=True)
        for row in experts.tolist():
            assert len(set(row)) == top_k
            assert set(row) <= set(range(4))

    def test_what_is_unlikely_weighs_nothing(self):
        weights, experts = ops.route(torch.tensor([[-1e4, 5.0, float("-inf")]]), 3, normalize=True)
        assert experts.tolist() == [[1, 0, 2]]
        assert weights.tolist() == [[1, 0, 0]]

    @pytest.mark.parametrize("num_experts", [3, 8, 60, 128])
    def test_every_path_is_the_reference(self, cpu_path, num_threads, num_experts):
        logits = 5 * torch.randn(3000, num_experts)
        for normalize in (False, True):
            weights, experts = ops.route(logits, 3, normalize=normalize)
            expected = reference.route(logits, 3, normalize=normalize)
            torch.testing.assert_close(weights, expected[0])
            # Two experts of one probability may change places.
            own = logits.softmax(-1).gather(1, experts)
            torch.testing.assert_close(own, logits.softmax(-1).gather(1, expected[1]))
            assert all(len(set(row)) == 3 for row in experts.tolist())

    @pytest.mark.parametrize("top_k", [0, 5])
    def test_more_experts_than_there_are(self, top_k):
        with pytest.raises(ValueError, match=f"route: top_k: expected 1 to 4, got {top_k}"):
            ops.route(torch.zeros(2, 4), top_k, normalize=False)

    def test_logits_of_another_type(self):
        with pytest.raises(ValueError, match="route: logits"):
            ops.route(torch.zeros(2, 4, dtype=torch.bfloat16), 2, normalize=False)

    @pytest.mark.parametrize("num_experts", [5, 8, 60, 128])
    def test_a_row_alone_is_the_same_bits(self, num_experts):
        logits = 3 * torch.randn(67, num_experts)
        weights, experts = ops.route(logits, 5, normalize=True)
        for row in range(67):
            alone = ops.route(logits[row : row + 1].clone(), 5, normalize=True)
            assert torch.equal(alone[0][0], weights[row])
            assert torch.equal(alone[1][0], experts[row])


def test_rows_of_experts():
    found = ops.rows_of_experts(torch.tensor([[4, 0], [2, 4], [0, 2]]), 6)
    assert [(e, rows.tolist(), places.tolist()) for e, rows, places in found] == [
        (0, [0, 2], [1, 4]),
        (2, [1, 2], [2, 5]),
        (4, [0, 1], [0, 3]),
    ]
    assert ops.rows_of_experts(torch.empty(0, 2, dtype=torch.int64), 6) == []


def test_used_experts():
    assert ops.used_experts(torch.tensor([[4, 0], [2, 4], [0, 2]]), 6) == [0, 2, 4]
    assert ops.used_experts(torch.empty(0, 2, dtype=torch.int64), 6) == []
    for wrong in (-1, 6):
        with pytest.raises(IndexError, match=rf"experts\[1\] is {wrong}, but .* has 6 experts"):
            ops.used_experts(torch.tensor([[4, wrong]]), 6)


def draw(rows, num_experts, top_k, dtype, seed, hidden=24, width=17):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    x = normal(rows, hidden).to(dtype)
    weights, experts = ops.route(normal(rows, num_experts), top_k, normalize=False)
    gate_up = [(normal(2 * width, hidden) / hidden**0.5).to(dtype) for _ in range(num_experts)]
    down = [(normal(hidden, width) / width**0.5).to(dtype) for _ in range(num_experts)]
    return x, weights, experts, gate_up, down


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=15, deadline=None)
@given(
    rows=st.integers(1, 20),
    num_experts=st.integers(1, 7),
    activation=st.sampled_from(["silu", "gelu", "gelu_tanh"]),
    is_packed=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_mix_experts(dtype, rows, num_experts, activation, is_packed, seed):
    x, weights, experts, gate_up, down = draw(rows, num_experts, min(3, num_experts), dtype, seed)
    wide = [[matrix.float() for matrix in matrices] for matrices in (gate_up, down)]
    exact = reference.mix_experts(x.float(), weights, experts, *wide, activation=activation)
    plain = reference.mix_experts(x, weights, experts, gate_up, down, activation=activation)
    if is_packed:
        gate_up, down = ([ops.pack_weight(m) for m in matrices] for matrices in (gate_up, down))
    actual = ops.mix_experts(x, weights, experts, gate_up, down, activation=activation)
    assert_close(actual, plain, exact)


def one_by_one(x, weights, experts, gate_up, down, activation):
    """What each row's experts give, added in ascending order: one row and expert at a time."""
    total = torch.zeros(x.shape)
    for row in range(len(x)):
        for place in experts[row].argsort().tolist():
            expert = int(experts[row, place])
            inner = ops.gated_linear(x[row : row + 1], gate_up[expert], activation=activation)
            out = ops.linear(inner, down[expert])[0]
            total[row] += out.float() * weights[row, place]
    return total.to(x.dtype)


def store(matrices, storage):
    if storage is None:
        return [ops.pack_weight(matrix) for matrix in matrices]
    return [ops.quantize_weight(matrix, storage) for matrix in matrices]


STORAGES = [None, ops.QuantizedLayout(8, 1 << 30), ops.QuantizedLayout(4, 16)]


@pytest.fixture
def only_the_fused_op(monkeypatch):
    """Fails where an op of one expert runs, and fills all memory with NaN."""

    def refuse(*args, **options):
        raise AssertionError("an expert runs by itself")

    monkeypatch.setattr(sglite.ops.experts, "linear", refuse)
    monkeypatch.setattr(sglite.ops.experts, "gated_linear", refuse)
    monkeypatch.setattr(
        sglite.ops.experts, "_bytes", lambda count: torch.full((count,), 0xFF, dtype=torch.uint8)
    )


@pytest.mark.usefixtures("only_the_fused_op")
class TestFused:
    @settings(
        max_examples=120,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )
    @given(
        dtype=st.sampled_from(DTYPES),
        rows=st.integers(1, 24),
        num_experts=st.sampled_from([1, 2, 5, 8, 128]),
        top_k=st.integers(1, 8),
        hidden=st.sampled_from([8, 33, 64]),
        width=st.sampled_from([1, 17, 48]),
        activation=st.sampled_from(["silu", "gelu", "gelu_tanh"]),
        storages=st.tuples(st.sampled_from(STORAGES), st.sampled_from(STORAGES)),
        path=st.sampled_from(_C.available_cpu_paths()),
        threads=st.integers(1, 3),
        seed=st.integers(0, 2**31),
    )
    def test_has_the_bits_of_single_ops(
        self,
        dtype,
        rows,
        num_experts,
        top_k,
        hidden,
        width,
        activation,
        storages,
        path,
        threads,
        seed,
    ):
        top_k = min(top_k, num_experts)
        drawn = draw(rows, num_experts, top_k, dtype, seed, hidden, width)
        x, weights, experts, gate_up, down = drawn
        gate_up, down = store(gate_up, storages[0]), store(down, storages[1])
        before = _C.cpu_path()
        _C.select_cpu_path(path)
        _C.set_num_threads(threads)
        try:
            actual = ops.mix_experts(x, weights, experts, gate_up, down, activation=activation)
            expected = one_by_one(x, weights, experts, gate_up, down, activation)
        finally:
            _C.set_num_threads(0)
            _C.select_cpu_path(before)
        assert torch.equal(actual, expected)

    # Enough work for a team, for all rows to go to one expert and to many.
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(("rows", "num_experts", "top_k"), [(1, 8, 8), (90, 1, 1), (70, 16, 4)])
    def test_much_work(self, cpu_path, num_threads, dtype, rows, num_experts, top_k):
        drawn = draw(rows, num_experts, top_k, dtype, 1, 160, 136)
        x, weights, experts, gate_up, down = drawn
        gate_up, down = store(gate_up, None), store(down, STORAGES[1])
        actual = ops.mix_experts(x, weights, experts, gate_up, down, activation="silu")
        expected = one_by_one(x, weights, experts, gate_up, down, "silu")
        assert torch.equal(actual, expected)

    def test_rows_may_be_apart(self):
        x, weights, experts, gate_up, down = draw(9, 4, 2, torch.bfloat16, 0)
        gate_up, down = store(gate_up, None), store(down, None)
        wide = torch.cat([x, x], dim=1)
        options = {"gate_up": gate_up, "down": down, "activation": "silu"}
        expected = ops.mix_experts(x, weights, experts, **options)
        assert torch.equal(ops.mix_experts(wide[:, 24:], weights, experts, **options), expected)

    def test_experts_that_are_not_used_are_not_looked_at(self):
        x, weights, experts, gate_up, down = draw(2, 6, 1, torch.float32, 0)
        experts = torch.tensor([[4], [1]])
        gate_up = [m if e in (1, 4) else None for e, m in enumerate(store(gate_up, None))]
        down = [m if e in (1, 4) else None for e, m in enumerate(store(down, None))]
        actual = ops.mix_experts(x, weights, experts, gate_up, down, activation="gelu")
        assert torch.equal(actual, one_by_one(x, weights, experts, gate_up, down, "gelu"))


class TestRefusals:
    @pytest.mark.parametrize(
        ("changes", "error", "message"),
        [
            ({"experts": torch.tensor([[0, 1], [2, 9]])}, IndexError, r"experts\[3\] is 9"),
            ({"experts": torch.tensor([[0, 1], [2, 2]])}, ValueError, "row 1 .* expert 2 twice"),
            ({"experts": torch.tensor([[0], [2]])}, ValueError, "experts"),
            ({"weights": torch.ones(2, 2, dtype=torch.float64)}, TypeError, "dtype"),
            ({"weights": torch.ones(2, 2).bfloat16()}, ValueError, "weights"),
            ({"x": torch.ones(2, 25)}, ValueError, "gate_up"),
            ({"x": torch.ones(2, 24).bfloat16()}, ValueError, "dtype"),
            ({"x": torch.ones(3, 24)}, ValueError, "weights"),
            ({"activation": "relu"}, ValueError, "activation"),
        ],
    )
    def test_what_does_not_fit(self, changes, error, message):
        x, weights, _, gate_up, down = draw(2, 3, 2, torch.float32, 0)
        arguments = {
            "x": x,
            "weights": weights,
            "experts": torch.tensor([[0, 1], [2, 0]]),
            "gate_up": store(gate_up, None),
            "down": store(down, None),
            "activation": "silu",
        }
        assert ops.mix_experts(**arguments).shape == (2, 24)
        with pytest.raises(error, match=message):
            ops.mix_experts(**{**arguments, **changes})

    def test_a_weight_of_another_shape(self):
        x, weights, experts, gate_up, _ = draw(2, 3, 3, torch.float32, 0)
        packed = store(gate_up, None)
        with pytest.raises(ValueError, match=r"mix_experts: gate_up: expected a weight \[48, 24\]"):
            ops.mix_experts(x, weights, experts, packed, packed, activation="silu")


def test_columns_in_another_order_are_left_to_single_ops():
    x, weights, experts, gate_up, down = draw(5, 3, 2, torch.float32, 0)
    order = torch.randperm(24)
    layout = ops.QuantizedLayout(8, 8)
    ordered = []
    for matrix in gate_up:
        ordered.append(ops.QuantizedWeight.empty(*matrix.shape, layout, matrix.dtype, order))
        ordered[-1].quantize_rows(0, matrix[:, order])
    down = store(down, None)
    actual = ops.mix_experts(x, weights, experts, ordered, down, activation="silu")
    assert torch.equal(actual, one_by_one(x, weights, experts, ordered, down, "silu"))


@pytest.mark.parametrize("storage", ["plain", *STORAGES])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_alone_is_the_same_bits(dtype, storage):
    x, weights, experts, gate_up, down = draw(40, 6, 3, dtype, 0)
    if storage != "plain":
        gate_up, down = store(gate_up, storage), store(down, storage)
    options = {"gate_up": gate_up, "down": down, "activation": "silu"}
    whole = ops.mix_experts(x, weights, experts, **options)
    for row in range(40):
        own = slice(row, row + 1)
        alone = ops.mix_experts(x[own], weights[own], experts[own], **options)
        assert torch.equal(alone, whole[own])


@pytest.mark.parametrize("is_packed", [False, True])
def test_no_rows(is_packed):
    x, weights, experts, gate_up, down = draw(0, 4, 2, torch.bfloat16, 0)
    if is_packed:
        gate_up, down = store(gate_up, None), store(down, None)
    out = ops.mix_experts(x, weights, experts, gate_up, down, activation="silu")
    assert (out.shape, out.dtype) == (x.shape, torch.bfloat16)
