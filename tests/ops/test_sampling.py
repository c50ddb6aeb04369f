"""Sampling against a full sort in float64, exact probabilities and published random numbers."""

import itertools
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglite import _C, ops
from sglite.ops import reference
from sglite.ops.sampling import (
    INTEGERS,
    NOT_A_NUMBER,
    NOTHING_LEFT,
    REALS,
    SAMPLED,
    TokenEdits,
    sampling_workspace,
)

DEFAULTS = {
    "temperature": 1.0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "top_k": -1,
    "seed": 0,
    "sample_index": 0,
    "position": 0,
}
NEGATIVE_INFINITY = -torch.inf


def as_signed(value):
    """The signed number with the same 64 bits."""
    return value - 2**64 if value >= 2**63 else value


def parameters(rows):
    """`reals` and `integers` from one dict for each row."""
    rows = [DEFAULTS | row for row in rows]
    reals = torch.tensor([[row[name] for name in REALS] for row in rows])
    integers = [[as_signed(row[name]) for name in INTEGERS] for row in rows]
    return reals.view(-1, len(REALS)), torch.tensor(integers, dtype=torch.int64).view(
        -1, len(INTEGERS)
    )


def repeated(count, *, first_position=0, **values):
    """The same parameters for `count` rows, whose positions count up."""
    reals, integers = parameters([values])
    integers = integers.repeat(count, 1)
    integers[:, INTEGERS.index("position")] = torch.arange(count) + first_position
    return reals.repeat(count, 1), integers


def make_edits(rows):
    """`TokenEdits` from one dict for each row: seen {id: (count, in_prompt)}, bias, allowed."""
    seen = [[(i, *entry) for i, entry in row.get("seen", {}).items()] for row in rows]
    bias = [list(row.get("bias", {}).items()) for row in rows]
    allowed = [row.get("allowed", []) for row in rows]
    offsets = [
        list(itertools.accumulate(map(len, lists), initial=0)) for lists in (seen, bias, allowed)
    ]

    def flat(lists):
        return list(itertools.chain.from_iterable(lists))

    return TokenEdits(
        torch.tensor(offsets),
        torch.tensor(flat(seen), dtype=torch.int32).view(-1, 3),
        torch.tensor([i for i, _ in flat(bias)], dtype=torch.int32),
        torch.tensor([value for _, value in flat(bias)], dtype=torch.float32),
        torch.tensor(flat(allowed), dtype=torch.int32),
    )


def draw_logits(generator, kind, rows, vocab):
    """Rows [rows, vocab] of float32 logits of some kind."""
    x = torch.randn(rows, vocab, generator=generator)
    if kind == "ties":  # as logits rounded to bfloat16 have them, and coarser
        return (x * 2).round() / 2
    if kind == "equal":
        return torch.full((rows, vocab), -1.25)
    if kind == "peaked":
        return x * 2.5 + 18.0 * (torch.rand(rows, vocab, generator=generator) < 3 / vocab)
    if kind == "narrow":
        return 5.0 + x * 1e-3
    if kind == "holes":
        return x.masked_fill(torch.rand(rows, vocab, generator=generator) < 0.5, NEGATIVE_INFINITY)
    if kind == "infinite":
        return x.masked_fill(torch.rand(rows, vocab, generator=generator) < 0.1, torch.inf)
    if kind == "huge":
        return (x * 1e38).clamp(-3.4e38, 3.4e38)
    if kind == "zeros":  # of both signs, which are one value
        return torch.where(x > 0, 0.0, -0.0)
    if kind == "ascending":
        return x.sort(-1).values * 3
    return x * 3


KINDS = (
    "normal",
    "ties",
    "equal",
    "peaked",
    "narrow",
    "holes",
    "infinite",
    "huge",
    "zeros",
    "ascending",
)


def draw_parameters(random, vocab):
    """One row's parameters; each filter is off in about a third of the rows."""
    return {
        "temperature": random.choice([0.0, 1e-5, 0.3, 1.0, 1.0, 2.5, 50.0]),
        "top_k": random.choice([-1, 0, 1, 2, random.randint(1, vocab + 3), random.randint(1, 60)]),
        "top_p": random.choice([1.0, 1.0, random.uniform(0.01, 1), 0.95, 0.999999, 1e-6]),
        "min_p": random.choice([0.0, 0.0, random.random() ** 4, 0.05, 1.0]),
        "repetition_penalty": random.choice([1.0, 1.3, 0.7]),
        "frequency_penalty": random.choice([0.0, 0.4, -0.3]),
        "presence_penalty": random.choice([0.0, 1.1, -0.6]),
        "seed": random.getrandbits(64),
        "sample_index": random.getrandbits(32),
        "position": random.getrandbits(34),
    }


def draw_edits(random, vocab):
    """One row's edits, often none."""
    edits = {}
    some = [random.randrange(vocab) for _ in range(random.randint(1, 12))]
    if random.random() < 0.3:
        edits["seen"] = {i: (random.choice([0, 0, 1, 3]), random.randint(0, 1)) for i in some}
    if random.random() < 0.3:
        edits["bias"] = {i: random.choice([-2.5, 0.5, 4.0, NEGATIVE_INFINITY]) for i in some}
    if random.random() < 0.2:
        edits["allowed"] = [random.randrange(vocab) for _ in range(random.randint(1, 12))]
    return edits


def acceptable_tokens(row, values, top_k, uniform):
    """The tokens that rounding may choose: a comparison within 2e-5 may go either way.

    Weights are float32, and at the end of a long tail 87 * 2**-24 away from the exact ones.
    """
    tokens = set()
    for top_p, min_p, change in itertools.product((-2e-5, 0, 2e-5), repeat=3):
        varied = values | {
            "top_p": min(1.0, values["top_p"] * (1 + top_p)),
            "min_p": min(1.0, values["min_p"] * (1 + min_p)),
        }
        sums = reference.sampling_probabilities(row, varied, top_k).cumsum(0)
        point = min(max(uniform + change, 0.0), 1 - 1e-15) * sums[-1]
        tokens.add(int(torch.searchsorted(sums, point, right=True)))
    return tokens


def count_differences(logits, reals, integers, edits, sample=ops.sample):
    """How many rows differ from the reference; fails where rounding does not explain it."""
    token_ids, status = sample(logits, reals, integers, edits=edits)
    expected_ids, expected_status = reference.sample(logits, reals, integers, edits=edits)
    assert torch.equal(status, expected_status)
    differing = (token_ids != expected_ids).nonzero().flatten().tolist()
    for r in differing:
        values = dict(zip(REALS, reals[r].tolist(), strict=True))
        top_k, seed, sample_index, position = integers[r].tolist()
        row = logits[r] if edits is None else reference.edit_logits(logits[r], values, edits, r)
        uniform = reference.random_uniform(seed, sample_index, position)
        assert int(token_ids[r]) in acceptable_tokens(row, values, top_k, uniform)
    return len(differing)


# --- random numbers ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # the known answers that the authors of Philox publish with Random123
        ("00000000 00000000 00000000 00000000", "00000000 00000000",
         "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
         "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
         "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)  # fmt: skip
def test_philox_gives_the_published_numbers(counter, key, words):
    counter, key, words = (
        tuple(int(w, 16) for w in text.split()) for text in (counter, key, words)
    )
    assert reference.philox4x32(counter, key) == words


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 2**64 - 1),
    sample_index=st.integers(0, 2**32 - 1),
    position=st.integers(0, 2**63 - 1),
)
def test_draws_with_the_random_number_of_the_reference(seed, sample_index, position):
    # Of 2**18 equal logits the token drawn is the integer part of 2**18 u.
    vocab = 2**18
    keys = {"seed": seed, "sample_index": sample_index, "position": position}
    token_ids, _ = ops.sample(torch.zeros(1, vocab), *parameters([keys]))
    assert int(token_ids) == int(reference.random_uniform(seed, sample_index, position) * vocab)


# --- tokens against a full sort ---------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    vocab=st.integers(1, 700) | st.integers(2000, 5000),
    rows=st.integers(0, 6),
    padding=st.integers(0, 3),
    with_edits=st.booleans(),
    random=st.randoms(use_true_random=False),
)
def test_matches_a_full_sort(kind, vocab, rows, padding, with_edits, random):
    generator = torch.Generator().manual_seed(random.getrandbits(60))
    logits = draw_logits(generator, kind, rows, vocab + padding)[:, :vocab]
    reals, integers = parameters([draw_parameters(random, vocab) for _ in range(rows)])
    edits = make_edits([draw_edits(random, vocab) for _ in range(rows)]) if with_edits else None
    before = logits.clone()
    count_differences(logits, reals, integers, edits)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("kind", KINDS)
def test_every_path_gives_the_tokens_of_a_full_sort(cpu_path, two_threads, kind):
    random = Random(kind)
    rows, vocab = 20, 8000
    logits = draw_logits(torch.Generator().manual_seed(1), kind, rows, vocab)
    reals, integers = parameters([draw_parameters(random, vocab) for _ in range(rows)])
    edits = make_edits([draw_edits(random, vocab) for _ in range(rows)])
    assert count_differences(logits, reals, integers, edits) == 0


@pytest.mark.parametrize("top_k", [1, 50, 300, 5000, 150000])
@pytest.mark.parametrize("top_p", [0.3, 0.95, 1.0])
def test_large_vocabularies(top_k, top_p):
    logits = draw_logits(torch.Generator().manual_seed(2), "ties", 4, 151936)
    logits[2:] += torch.randn(2, 151936, generator=torch.Generator().manual_seed(3))
    reals, integers = repeated(4, top_k=top_k, top_p=top_p, seed=5)
    assert count_differences(logits, reals, integers, None) == 0


def test_equal_logits_keep_the_lower_ids():
    logits = torch.tensor([[1.0, 3.0, 3.0, 3.0, 0.0, 3.0]])
    greedy = ops.sample(logits, *repeated(1, temperature=0.0))[0]
    assert greedy.tolist() == [1]
    rows = torch.zeros(500, dtype=torch.int64)
    drawn = ops.sample(logits, *repeated(500, top_k=3), rows=rows)[0]
    assert set(drawn.tolist()) == {1, 2, 3}
    drawn = ops.sample(logits, *repeated(500, top_p=0.4), rows=rows)[0]
    assert set(drawn.tolist()) == {1, 2}


def test_the_order_of_the_filters():
    # Probabilities 0.5, 0.25, 0.125, 0.125. Top-k leaves the first three; of them top-p 0.6 takes
    # two, though the first two have 0.75 of all: 0.5 / 0.875 is below 0.6. Min-p is relative to
    # the largest.
    logits = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()
    rows = torch.zeros(400, dtype=torch.int64)

    def kept(**values):
        return set(ops.sample(logits, *repeated(400, **values), rows=rows)[0].tolist())

    assert kept(top_k=3) == {0, 1, 2}
    assert kept(top_k=3, top_p=0.6) == {0, 1}
    assert kept(top_k=3, top_p=0.56) == {0}
    assert kept(top_p=0.8) == {0, 1, 2}
    assert kept(top_p=0.8, min_p=0.4) == {0, 1}
    assert kept(min_p=0.2) == {0, 1, 2, 3}
    # At temperature 2 the probabilities go with the square root: 0.5**0.5 of the largest.
    assert kept(min_p=0.6, temperature=2.0) == {0, 1}
    assert kept(min_p=0.6) == {0}


# --- distribution -----------------------------------------------------------------------------


def chi_square_p_value(token_ids, probabilities):
    """The probability of a fit as bad as this, if the tokens have these probabilities."""
    counts = torch.bincount(token_ids, minlength=len(probabilities)).double()
    assert counts[probabilities == 0].sum() == 0
    expected = probabilities * len(token_ids)
    common = expected >= 8
    observed = torch.cat([counts[common], counts[~common].sum()[None]])
    expected = torch.cat([expected[common], expected[~common].sum()[None]])
    observed, expected = observed[expected > 0], expected[expected > 0]
    statistic = ((observed - expected) ** 2 / expected).sum()
    freedom = torch.tensor((len(expected) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, statistic / 2)) if len(expected) > 1 else 1.0


DRAWS = 40000
DISTRIBUTIONS = [
    {},
    {"temperature": 0.6},
    {"temperature": 3.0, "top_k": 40},
    {"top_p": 0.8},
    {"temperature": 1.5, "min_p": 0.1},
    {"temperature": 1.7, "top_k": 60, "top_p": 0.9, "min_p": 0.02},
]


def draw_many(values, varied, vocab=300):
    """Tokens drawn from one row of logits, and their exact probabilities."""
    logits = torch.randn(1, vocab, generator=torch.Generator().manual_seed(7)) * 1.5
    reals, integers = repeated(DRAWS, seed=11, **values)
    integers[:, INTEGERS.index("position")] = 3
    integers[:, INTEGERS.index(varied)] = torch.arange(DRAWS)
    token_ids, _ = ops.sample(logits, reals, integers, rows=torch.zeros(DRAWS, dtype=torch.int64))
    exact = dict(zip(REALS, reals[0].tolist(), strict=True))
    top_k = int(integers[0, INTEGERS.index("top_k")])
    return token_ids, reference.sampling_probabilities(logits[0], exact, top_k)


@pytest.mark.parametrize("varied", ["position", "seed", "sample_index"])
@pytest.mark.parametrize("values", DISTRIBUTIONS, ids=str)
def test_frequencies_are_the_exact_probabilities(values, varied):
    token_ids, probabilities = draw_many(values, varied)
    assert chi_square_p_value(token_ids, probabilities) > 1e-3


@pytest.mark.parametrize("varied", ["position", "seed", "sample_index"])
def test_the_chi_square_test_sees_a_wrong_distribution(varied):
    token_ids, _ = draw_many({"temperature": 1.05}, varied)
    _, probabilities = draw_many({}, varied)
    assert chi_square_p_value(token_ids, probabilities) < 1e-6


def test_tokens_of_neighbouring_positions_are_independent():
    token_ids, probabilities = draw_many({"top_k": 10}, "position")
    pairs = token_ids[:-1:2] * len(probabilities) + token_ids[1::2]
    assert chi_square_p_value(pairs, torch.outer(probabilities, probabilities).flatten()) > 1e-3


# --- a row alone and in a batch ---------------------------------------------------------------


def test_a_row_does_not_depend_on_its_neighbours_or_threads(cpu_path):
    random = Random(4)
    rows, vocab = 24, 30000
    logits = draw_logits(torch.Generator().manual_seed(3), "normal", rows, vocab)
    chosen = [draw_parameters(random, vocab) for _ in range(rows)]
    edits = [draw_edits(random, vocab) for _ in range(rows)]
    results = []
    for threads in (1, 2):
        _C.set_num_threads(threads)
        results.append(ops.sample(logits, *parameters(chosen), edits=make_edits(edits))[0])
    _C.set_num_threads(0)
    assert torch.equal(*results)
    for r in range(rows):
        alone, _ = ops.sample(
            logits[r : r + 1], *parameters(chosen[r : r + 1]), edits=make_edits(edits[r : r + 1])
        )
        assert int(alone) == int(results[0][r])


def test_rows_pick_rows_of_the_logits():
    logits = torch.randn(5, 1000)
    rows = torch.tensor([4, 0, 4])
    reals, integers = repeated(3, seed=9)
    picked = ops.sample(logits, reals, integers, rows=rows)[0]
    assert torch.equal(picked, ops.sample(logits[rows], reals, integers)[0])
    tokens = torch.tensor([5, 6, 7])
    for some, all_rows in zip(
        ops.log_probs(logits, tokens, 3, rows=rows), ops.log_probs(logits[rows], tokens, 3),
        strict=True,
    ):  # fmt: skip
        assert torch.equal(some, all_rows)


def test_a_smaller_workspace_gives_the_same_tokens():
    logits = torch.randn(8, 50000)
    arguments = repeated(8, seed=9, top_p=0.9)
    one_thread = sampling_workspace(50000)[: sampling_workspace(50000).numel() // _C.num_threads()]
    assert torch.equal(
        ops.sample(logits, *arguments, workspace=one_thread)[0],
        ops.sample(logits, *arguments, workspace=sampling_workspace(50000))[0],
    )


# --- penalties, biases, bans ------------------------------------------------------------------


def test_penalties_and_biases_by_hand():
    # The edited logits show in which token is the largest, one step of 0.25 above the others.
    logits = torch.tensor([[2.0, -1.0, 3.0, 0.5, 1.0]])
    values = {
        "temperature": 0.0,
        "repetition_penalty": 2.0,
        "frequency_penalty": 0.5,
        "presence_penalty": 0.25,
    }
    seen = {0: (0, 1), 1: (2, 0), 2: (3, 1)}
    edited = torch.tensor([1.0, -2.0 - 1.0 - 0.25, 1.5 - 1.5 - 0.25, 0.5, 1.0])
    for token in range(5):
        lift = float(edited.max() - edited[token]) + 0.25
        for change, winner in ((lift, token), (lift - 0.5, None)):
            edits = make_edits([{"seen": seen, "bias": {token: change}}])
            chosen = int(ops.sample(logits, *parameters([values]), edits=edits)[0])
            if winner is not None:
                assert chosen == winner
            elif edited[token] < edited.max():
                assert chosen != token


def test_a_ban_holds_for_an_infinite_logit():
    logits = torch.tensor([[0.0, torch.inf, 1.0]])
    edits = make_edits([{"bias": {1: NEGATIVE_INFINITY}}])
    assert ops.sample(logits, *repeated(1, temperature=0.0), edits=edits)[0].tolist() == [2]


def test_only_allowed_tokens_are_drawn():
    rows = torch.zeros(300, dtype=torch.int64)
    edits = make_edits([{"allowed": [7, 3, 900]}] * 300)
    drawn, _ = ops.sample(torch.zeros(1, 1000), *repeated(300), rows=rows, edits=edits)
    assert set(drawn.tolist()) == {3, 7, 900}


# --- rows without a token ---------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("vocab", [1, 7, 16, 300, 5000])
def test_nan_and_empty_rows_are_told_and_do_no_harm(cpu_path, temperature, vocab):
    logits = torch.randn(6, vocab)
    logits[1, vocab // 2] = torch.nan
    logits[2] = NEGATIVE_INFINITY
    logits[4] = -torch.nan
    values = repeated(6, temperature=temperature, top_p=0.9, top_k=20, min_p=0.01)
    token_ids, status = ops.sample(logits, *values)
    bad = [SAMPLED, NOT_A_NUMBER, NOTHING_LEFT, SAMPLED, NOT_A_NUMBER, SAMPLED]
    assert status.tolist() == bad
    assert token_ids[[1, 2, 4]].tolist() == [-1, -1, -1]
    others = torch.tensor([0, 3, 5])
    picked = ops.sample(logits[others], values[0][others], values[1][others])[0]
    assert torch.equal(token_ids[others], picked)


def test_nan_is_told_even_where_it_is_banned():
    logits = torch.zeros(3, 10)
    logits[0, 4] = logits[1, 4] = torch.nan
    edits = make_edits(
        [
            {"bias": {4: NEGATIVE_INFINITY}},
            {"allowed": [1]},
            {"bias": dict.fromkeys(range(10), NEGATIVE_INFINITY)},
        ]
    )
    _, status = ops.sample(logits, *repeated(3), edits=edits)
    assert status.tolist() == [NOT_A_NUMBER, NOT_A_NUMBER, NOTHING_LEFT]


# --- log-probabilities ------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    vocab=st.integers(1, 700) | st.integers(2000, 5000),
    rows=st.integers(0, 5),
    padding=st.integers(0, 3),
    random=st.randoms(use_true_random=False),
)
def test_log_probs_match_log_softmax(kind, vocab, rows, padding, random):
    generator = torch.Generator().manual_seed(random.getrandbits(60))
    logits = draw_logits(generator, kind, rows, vocab + padding)[:, :vocab]
    token_ids = torch.randint(vocab, (rows,), generator=generator)
    top_n = random.choice([0, 1, min(5, vocab), random.randint(0, vocab)])
    if rows and bool((logits == NEGATIVE_INFINITY).all(-1).any()):
        return
    actual = ops.log_probs(logits, token_ids, top_n)
    expected = reference.log_probs(logits, token_ids, top_n)
    assert torch.equal(actual.ranks, expected.ranks)
    assert torch.equal(actual.top_ids, expected.top_ids)
    torch.testing.assert_close(actual.logprobs, expected.logprobs, rtol=3e-7, atol=1e-6)
    torch.testing.assert_close(actual.top_logprobs, expected.top_logprobs, rtol=3e-7, atol=1e-6)


def test_log_probs_on_every_path(cpu_path, num_threads):
    logits = draw_logits(torch.Generator().manual_seed(5), "ties", 20, 49152)
    token_ids = torch.arange(20) * 11
    actual = ops.log_probs(logits, token_ids, 20)
    # In float64, since torch's own float32 sums differ by processor.
    every = torch.log_softmax(logits.double(), -1).float()
    torch.testing.assert_close(actual.logprobs, every[torch.arange(20), token_ids])
    torch.testing.assert_close(actual.top_logprobs, torch.topk(every, 20).values)
    assert torch.equal(actual.top_ids, reference.log_probs(logits, token_ids, 20).top_ids)
    for r in (0, 19):  # alone and in the batch
        alone = ops.log_probs(logits[r : r + 1], token_ids[r : r + 1], 20)
        assert torch.equal(alone.logprobs[0], actual.logprobs[r])


def test_log_probs_of_rows_without_a_distribution_are_nan(cpu_path):
    logits = torch.randn(3, 300)
    logits[0, 5] = torch.nan
    logits[1] = NEGATIVE_INFINITY
    actual = ops.log_probs(logits, torch.tensor([1, 2, 3]), 2)
    assert actual.logprobs.isnan().tolist() == [True, True, False]
    assert actual.top_logprobs.isnan().all(-1).tolist() == [True, True, False]


# --- errors -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": -1.0}, r"expected temperature 0 or at least 1e-30 in row 1, got -1"),
        ({"temperature": torch.nan}, "expected temperature"),
        ({"temperature": torch.inf}, "expected temperature"),
        ({"top_p": 0.0}, r"expected top_p in \(0, 1\]"),
        ({"top_p": torch.nan}, r"expected top_p in \(0, 1\]"),
        ({"min_p": 1.5}, r"expected min_p in \[0, 1\]"),
        ({"repetition_penalty": 0.0}, "expected repetition_penalty above 0"),
        ({"frequency_penalty": torch.inf}, "expected a finite frequency_penalty"),
        ({"presence_penalty": torch.nan}, "expected a finite presence_penalty"),
    ],
)
def test_refuses_parameters_out_of_range(change, message):
    with pytest.raises(ValueError, match="sample: reals: " + message):
        ops.sample(torch.zeros(2, 4), *parameters([{}, change]))


def test_names_the_argument_and_the_shape():
    values = repeated(2)
    with pytest.raises(ValueError, match=r"sample: logits: expected float32, got bfloat16\[2, 4\]"):
        ops.sample(torch.zeros(2, 4, dtype=torch.bfloat16), *values)
    with pytest.raises(ValueError, match=r"sample: token_ids: expected shape \[3\]"):
        ops.sample(torch.zeros(3, 4), *values)
    with pytest.raises(ValueError, match=r"sample: logits: expected 1 to 2\^31 - 1 columns"):
        ops.sample(torch.zeros(2, 0), *values)
    with pytest.raises(ValueError, match=r"sample: rows: expected numbers from 0 to 1, not 2"):
        ops.sample(torch.zeros(2, 4), *values, rows=torch.tensor([0, 2]))
    with pytest.raises(ValueError, match=r"sample: workspace: expected at least \d+ bytes"):
        ops.sample(torch.zeros(2, 4), *values, workspace=torch.empty(8, dtype=torch.uint8))
    for name, edit in (("seen", {"seen": {4: (1, 0)}}), ("bias_ids", {"bias": {-1: 1.0}}),
                       ("allowed_ids", {"allowed": [9]})):  # fmt: skip
        with pytest.raises(
            ValueError, match=rf"sample: {name}: expected token ids from 0 to 3, not"
        ):
            ops.sample(torch.zeros(2, 4), *values, edits=make_edits([{}, edit]))
    edits = make_edits([{"allowed": [1]}, {}])
    edits.offsets[2, 1] = 5
    with pytest.raises(ValueError, match="sample: offsets: expected ascending numbers from 0 to 1"):
        ops.sample(torch.zeros(2, 4), *values, edits=edits)
    tokens = torch.tensor([0, 4])
    with pytest.raises(ValueError, match=r"log_probs: token_ids: expected token ids from 0 to 3"):
        ops.log_probs(torch.zeros(2, 4), tokens)
    with pytest.raises(ValueError, match=r"log_probs: top_ids: expected at most 4 columns"):
        ops.log_probs(torch.zeros(2, 4), tokens - tokens, 5)
