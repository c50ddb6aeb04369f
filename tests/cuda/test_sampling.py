"""Sampling on the GPU against a full sort in float64, exact probabilities and the CPU's tokens."""

from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglite import ops
from sglite.ops import reference
from sglite.ops.sampling import INTEGERS, NOT_A_NUMBER, NOTHING_LEFT, REALS, SAMPLED, TokenEdits
from tests.ops.test_sampling import (
    DISTRIBUTIONS,
    KINDS,
    NEGATIVE_INFINITY,
    chi_square_p_value,
    count_differences,
    draw_edits,
    draw_logits,
    draw_parameters,
    make_edits,
    parameters,
    repeated,
)


class Gpu:
    """The ops on the GPU, for tensors that lie on the CPU."""

    def __init__(self, device):
        self.device = device

    def sample(self, logits, reals, integers, *, edits=None, rows=None):
        found = ops.sample(
            logits.to(self.device),
            reals.to(self.device),
            integers.to(self.device),
            edits=edits and TokenEdits(*(tensor.to(self.device) for tensor in edits)),
            rows=rows if rows is None else rows.to(self.device),
        )
        return tuple(tensor.cpu() for tensor in found)

    def log_probs(self, logits, token_ids, top_n=0):
        found = ops.log_probs(logits.to(self.device), token_ids.to(self.device), top_n)
        return ops.LogProbs(*(tensor.cpu() for tensor in found))


@pytest.fixture
def on_gpu(gpu):
    return Gpu(gpu)


VOCABS = st.integers(1, 700) | st.integers(2000, 5000) | st.sampled_from([8192, 20000])
DRAWN = {
    "kind": st.sampled_from(KINDS),
    "vocab": VOCABS,
    "rows": st.integers(0, 4),
    "padding": st.integers(0, 4),
    "random": st.randoms(use_true_random=False),
}


@settings(max_examples=60, deadline=None)
@given(with_edits=st.booleans(), **DRAWN)
def test_matches_a_full_sort(gpu, kind, vocab, rows, padding, with_edits, random):
    generator = torch.Generator().manual_seed(random.getrandbits(60))
    logits = draw_logits(generator, kind, rows, vocab + padding)[:, :vocab]
    reals, integers = parameters([draw_parameters(random, vocab) for _ in range(rows)])
    edits = make_edits([draw_edits(random, vocab) for _ in range(rows)]) if with_edits else None
    count_differences(logits, reals, integers, edits, sample=Gpu(gpu).sample)


@pytest.mark.parametrize("kind", KINDS)
def test_large_vocabularies(on_gpu, kind):
    random = Random(kind)
    logits = draw_logits(torch.Generator().manual_seed(2), kind, 1, 151936)
    rows = 8
    chosen = [draw_parameters(random, 151936) for _ in range(rows)]
    chosen[0] |= {"temperature": 1.0, "top_k": 5000, "top_p": 0.9}
    chosen[1] |= {"temperature": 1.0, "top_k": 50, "top_p": 0.9}
    chosen[2] |= {"temperature": 1.0, "top_k": -1, "top_p": 0.999}
    reals, integers = parameters(chosen)
    edits = make_edits([draw_edits(random, 151936) for _ in range(rows)])
    logits = logits.expand(rows, -1)
    assert count_differences(logits, reals, integers, edits, sample=on_gpu.sample) == 0


@pytest.mark.parametrize("top_p", [0.3, 0.95, 1.0])
@pytest.mark.parametrize("top_k", [1, 50, 300, 5000, 150000])
def test_gives_the_tokens_of_the_reference(on_gpu, top_k, top_p):
    logits = torch.randn(3, 32000, generator=torch.Generator().manual_seed(2)) * 2
    logits[1] = logits[1].bfloat16()
    reals, integers = repeated(3, top_k=top_k, top_p=top_p, seed=5)
    found, _ = on_gpu.sample(logits, reals, integers)
    expected, _ = reference.sample(logits, reals, integers)
    assert torch.equal(found, expected)


def draw_many(on_gpu, values, varied, draws, vocab=300):
    logits = torch.randn(1, vocab, generator=torch.Generator().manual_seed(7)) * 1.5
    reals, integers = repeated(draws, seed=11, **values)
    integers[:, INTEGERS.index("position")] = 3
    integers[:, INTEGERS.index(varied)] = torch.arange(draws)
    rows = torch.zeros(draws, dtype=torch.int64)
    token_ids, _ = on_gpu.sample(logits, reals, integers, rows=rows)
    exact = dict(zip(REALS, reals[0].tolist(), strict=True))
    top_k = int(integers[0, INTEGERS.index("top_k")])
    return token_ids, reference.sampling_probabilities(logits[0], exact, top_k)


@pytest.mark.parametrize("varied", ["position", "seed", "sample_index"])
@pytest.mark.parametrize("values", DISTRIBUTIONS, ids=str)
def test_frequencies_are_the_exact_probabilities(gpu, on_gpu, values, varied):
    draws = 40000 if gpu.type == "cuda" else 800
    token_ids, probabilities = draw_many(on_gpu, values, varied, draws)
    assert chi_square_p_value(token_ids, probabilities) > 1e-3


def test_a_row_does_not_depend_on_its_neighbours(on_gpu):
    random = Random(4)
    rows, vocab = 40, 9000
    logits = draw_logits(torch.Generator().manual_seed(3), "normal", rows, vocab)
    chosen = [draw_parameters(random, vocab) for _ in range(rows)]
    edits = [draw_edits(random, vocab) for _ in range(rows)]
    together, _ = on_gpu.sample(logits, *parameters(chosen), edits=make_edits(edits))
    for part in ([0], [7], list(range(10, 30)), [39]):
        some, _ = on_gpu.sample(
            logits[part],
            *parameters([chosen[r] for r in part]),
            edits=make_edits([edits[r] for r in part]),
        )
        assert torch.equal(some, together[part])


def test_tokens_that_share_the_last_place_are_kept_by_id(on_gpu):
    # More ties than the short list holds, in several blocks.
    logits = torch.zeros(1, 30000)
    logits[0, 10::20] = 1.0
    draws = 64
    rows = torch.zeros(draws, dtype=torch.int64)
    for top_k, last in ((700, 10 + 20 * 699), (1, 10), (1600, 105)):
        values = {"top_k": top_k, "temperature": 30.0}
        drawn, _ = on_gpu.sample(logits, *repeated(draws, **values), rows=rows)
        expected, _ = reference.sample(logits, *repeated(draws, **values), rows=rows)
        assert torch.equal(drawn, expected)
        ties = drawn[drawn % 20 == 10] if top_k < 1500 else drawn[drawn % 20 != 10]
        assert ties.numel() == 0 or int(ties.max()) <= last


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("vocab", [1, 7, 300, 5000])
def test_nan_and_empty_rows_are_told(on_gpu, temperature, vocab):
    logits = torch.randn(6, vocab)
    logits[1, vocab // 2] = torch.nan
    logits[2] = NEGATIVE_INFINITY
    logits[4] = -torch.nan
    values = repeated(6, temperature=temperature, top_p=0.9, top_k=20, min_p=0.01)
    token_ids, status = on_gpu.sample(logits, *values)
    bad = [SAMPLED, NOT_A_NUMBER, NOTHING_LEFT, SAMPLED, NOT_A_NUMBER, SAMPLED]
    assert status.tolist() == bad
    assert token_ids[[1, 2, 4]].tolist() == [-1, -1, -1]


def test_nan_is_told_even_where_it_is_banned(on_gpu):
    logits = torch.zeros(3, 10)
    logits[0, 4] = logits[1, 4] = torch.nan
    banned = {"bias": dict.fromkeys(range(10), NEGATIVE_INFINITY)}
    edits = make_edits([{"bias": {4: NEGATIVE_INFINITY}}, {"allowed": [1]}, banned])
    _, status = on_gpu.sample(logits, *repeated(3), edits=edits)
    assert status.tolist() == [NOT_A_NUMBER, NOT_A_NUMBER, NOTHING_LEFT]


def test_a_token_with_several_biases(on_gpu):
    logits = torch.zeros(1, 5000)
    edits = TokenEdits(
        torch.tensor([[0, 0], [0, 4], [0, 0]]),
        torch.zeros(0, 3, dtype=torch.int32),
        torch.tensor([4000, 7, 4000, 7], dtype=torch.int32),
        torch.tensor([1.0, 3.0, 1.0, NEGATIVE_INFINITY]),
        torch.zeros(0, dtype=torch.int32),
    )
    assert on_gpu.sample(logits, *repeated(1, temperature=0.0), edits=edits)[0].tolist() == [4000]


@settings(max_examples=50, deadline=None)
@given(**DRAWN)
def test_log_probs_match_log_softmax(gpu, kind, vocab, rows, padding, random):
    generator = torch.Generator().manual_seed(random.getrandbits(60))
    logits = draw_logits(generator, kind, rows, vocab + padding)[:, :vocab]
    token_ids = torch.randint(vocab, (rows,), generator=generator)
    top_n = random.choice([0, 1, min(5, vocab), min(20, vocab), random.randint(0, vocab)])
    if rows and bool((logits == NEGATIVE_INFINITY).all(-1).any()):
        return
    actual = Gpu(gpu).log_probs(logits, token_ids, top_n)
    expected = reference.log_probs(logits, token_ids, top_n)
    assert torch.equal(actual.ranks, expected.ranks)
    assert torch.equal(actual.top_ids, expected.top_ids)
    torch.testing.assert_close(actual.logprobs, expected.logprobs, rtol=3e-7, atol=1e-6)
    torch.testing.assert_close(actual.top_logprobs, expected.top_logprobs, rtol=3e-7, atol=1e-6)


def test_log_probs_of_rows_without_a_distribution_are_nan(on_gpu):
    logits = torch.randn(3, 300)
    logits[0, 5] = torch.nan
    logits[1] = NEGATIVE_INFINITY
    actual = on_gpu.log_probs(logits, torch.tensor([1, 2, 3]), 2)
    assert actual.logprobs.isnan().tolist() == [True, True, False]
    assert actual.top_logprobs.isnan().all(-1).tolist() == [True, True, False]


def test_writes_where_it_is_told(gpu):
    logits = torch.randn(4, 1000).to(gpu)
    values = [tensor.to(gpu) for tensor in repeated(4, seed=3)]
    buffers = torch.full((6,), -7, device=gpu), torch.full((6,), -7, dtype=torch.int32, device=gpu)
    out = buffers[0][1:5], buffers[1][1:5]
    ops.sample(logits, *values, out=out)
    assert torch.equal(out[0], ops.sample(logits, *values)[0])
    for buffer in buffers:
        assert buffer[[0, 5]].tolist() == [-7, -7]


def test_a_graph_serves_every_mix_of_parameters(gpu):
    if gpu.type != "cuda":
        pytest.skip("needs an NVIDIA GPU: the emulator has no graphs")
    random = Random(8)
    rows, vocab = 12, 40000
    logits = draw_logits(torch.Generator().manual_seed(3), "normal", rows, vocab).to(gpu)
    reals, integers = (tensor.to(gpu) for tensor in repeated(rows))
    workspace = ops.sampling_workspace(vocab, rows, gpu)
    out = (
        torch.empty(rows, dtype=torch.int64, device=gpu),
        torch.empty(rows, dtype=torch.int32, device=gpu),
    )
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.sample(logits, reals, integers, workspace=workspace, out=out)
    for _ in range(20):
        chosen = parameters([draw_parameters(random, vocab) for _ in range(rows)])
        reals.copy_(chosen[0])
        integers.copy_(chosen[1])
        logits.normal_()
        graph.replay()
        assert torch.equal(out[0], ops.sample(logits, reals, integers)[0])


def test_refuses_what_does_not_fit(gpu):
    values = [tensor.to(gpu) for tensor in repeated(2)]
    logits = torch.zeros(2, 4, device=gpu)
    with pytest.raises(ValueError, match=r"sample: reals: expected shape \[2, 6\]"):
        ops.sample(logits, values[0][:, :5].contiguous(), values[1])
    with pytest.raises(ValueError, match=r"log_probs: top_ids: expected at most 4 columns"):
        ops.log_probs(logits, values[1][:, 0].clamp(min=0).contiguous(), 5)
