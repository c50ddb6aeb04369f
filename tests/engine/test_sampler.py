"""The sampler against naive code that starts from scratch at every step."""

import gc
from random import Random

import pytest
import torch

from sglite.engine.request import Request
from sglite.engine.sampler import Sampler
from sglite.engine.scheduler import Outcome
from sglite.engine.stopping import StopChecker
from sglite.interface.errors import RequestError
from sglite.interface.outputs import Logprob
from sglite.interface.sampling_params import SamplingParams
from sglite.ops import reference

VOCAB = 60


class Texts:
    """Stands in for the tokenizer."""

    def decode_one(self, token_id):
        return f"<{token_id}>"


def make_request(prompt=(1, 2, 3), output=(), *, seed=0, index=0, end=(), banned=(), **params):
    params = SamplingParams(**{"max_new_tokens": 100} | params).resolve()
    request = Request(
        list(prompt),
        params,
        seed=seed,
        sample_index=index,
        banned_sequences=banned,
        stop_checker=StopChecker(params, end_token_ids=end),
    )
    for token in output:
        request.append(token)
    return request


def sample(logits, requests, sampler=None):
    indices = [len(request.output_token_ids) for request in requests]
    return (sampler or Sampler(Texts())).draw(logits, requests, indices).collect()


def token_ids(logits, requests):
    results = sample(logits, requests)
    assert [result.error for result in results] == [None] * len(results)
    return [result.token_id for result in results]


def naive_token(logits, request, ban=()):
    """One token, from the prompt and output as they are and a full sort in float64."""
    params, output = request.params, request.output_token_ids
    row = logits.clone()
    for token in range(len(row)):
        count = output.count(token)
        if count or token in request.prompt_token_ids.tolist():
            penalty = params.repetition_penalty
            row[token] = row[token] / penalty if row[token] > 0 else row[token] * penalty
        row[token] -= params.frequency_penalty * count
        row[token] -= params.presence_penalty * (count > 0)
        row[token] += params.logit_bias.get(token, 0.0)
        if params.allowed_token_ids and token not in params.allowed_token_ids:
            row[token] = -torch.inf
        if token in ban:
            row[token] = -torch.inf
    values = {name: getattr(params, name) for name in ("temperature", "top_p", "min_p")}
    sums = reference.sampling_probabilities(row, values, params.top_k).cumsum(0)
    uniform = reference.random_uniform(request.seed, request.sample_index, len(output))
    return int(torch.searchsorted(sums, uniform * sums[-1], right=True))


def draw_params(random):
    """Parameters of one request; most things are off most of the time."""
    params = {"temperature": random.choice([0.0, 0.7, 1.0])}
    for name, values in {
        "top_k": [5, 40],
        "top_p": [0.7, 0.97],
        "min_p": [0.05],
        "repetition_penalty": [0.8, 1.3],
        "frequency_penalty": [-0.3, 0.4],
        "presence_penalty": [0.6],
        "logit_bias": [{4: 1.5, 50: -2.0}],
        "allowed_token_ids": [list(range(0, VOCAB, 3))],
    }.items():
        if random.random() < 0.3:
            params[name] = random.choice(values)
    return params


@pytest.mark.parametrize("seed", range(10))
def test_a_changing_batch_gives_the_tokens_of_naive_code(seed):
    random = Random(seed)
    generator = torch.Generator().manual_seed(seed)
    sampler, running = Sampler(Texts()), []
    for _ in range(30):
        if random.random() < 0.4 or not running:
            prompt = [random.randrange(VOCAB) for _ in range(random.randint(1, 40))]
            seed, index = random.getrandbits(64), random.randrange(4)
            running.append(make_request(prompt, seed=seed, index=index, **draw_params(random)))
        if len(running) > 5:
            running.pop(random.randrange(len(running)))
        random.shuffle(running)
        logits = torch.randn(len(running), VOCAB, generator=generator) * 2
        for row, request, result in zip(
            logits, running, sample(logits, running, sampler), strict=True
        ):
            assert result == Outcome(naive_token(row, request))
            request.append(result.token_id)


def test_the_same_seed_gives_the_same_tokens_alone_and_in_a_batch():
    logits = torch.randn(1, 5000, generator=torch.Generator().manual_seed(0))
    requests = [
        make_request(seed=seed, index=index, output=[1] * length, top_p=0.9)
        for seed, index, length in [(7, 0, 0), (8, 0, 0), (7, 1, 0), (7, 0, 1), (2**64 - 1, 0, 5)]
    ]
    together = token_ids(logits.expand(5, -1).contiguous(), requests)
    assert together == [token_ids(logits, [request])[0] for request in requests]
    assert len(set(together)) == 5  # seed, sample index and position all matter


def test_the_logits_stay_as_they_are():
    logits = torch.randn(2, VOCAB)
    before = logits.clone()
    requests = [
        make_request(repetition_penalty=2.0, logit_bias={5: 9.0}),
        make_request(logits_processors=lambda ids, row: row.fill_(0.0)),
    ]
    sample(logits, requests)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_takes_logits_of_other_types_and_strides(dtype):
    logits = torch.randn(VOCAB, 3).to(dtype).t()
    requests = [make_request(temperature=0) for _ in range(3)]
    assert token_ids(logits, requests) == logits.float().argmax(-1).tolist()


def test_no_requests_give_no_tokens():
    assert sample(torch.empty(0, VOCAB), []) == []


# --- bans ---------------------------------------------------------------------------------------


def ranked(*tokens):
    """One row of logits whose best tokens are these, in order."""
    logits = torch.zeros(1, VOCAB)
    for place, token in enumerate(tokens):
        logits[0, token] = 10.0 - place
    return logits


def test_banned_sequences_lose_their_last_token():
    banned = [[9], [4, 5, 6], [5, 7], [8, 6]]

    def best(*output):
        request = make_request(output=output, temperature=0, banned=banned)
        return token_ids(ranked(9, 6, 7, 8), [request])

    assert best() == [6]
    assert best(4, 5) == [8]  # 6 by the second, 7 by the third
    assert best(3, 5) == [6]
    assert best(4, 5, 1) == [6]
    assert best(8) == [7]
    assert best(5) == [6]  # too short for the second; the prompt does not count


def test_ends_are_banned_until_min_new_tokens():
    def best(*output, **params):
        request = make_request(output=output, temperature=0, end=[9], **params)
        return token_ids(ranked(9, 6, 7), [request])

    assert best() == [9]
    assert best(min_new_tokens=2) == [6]
    assert best(min_new_tokens=2, stop_token_ids=[6]) == [7]
    assert best(1, min_new_tokens=2) == [6]
    assert best(1, 1, min_new_tokens=2) == [9]


def test_bans_beyond_the_vocabulary_are_no_matter():
    # Tokenizers may have more tokens than the model has logits; so may placeholders in a prompt.
    request = make_request(
        prompt=[1, VOCAB + 5],
        end=[VOCAB],
        banned=[[VOCAB + 1], [3, VOCAB + 1]],
        output=[3],
        min_new_tokens=5,
        repetition_penalty=1.5,
        temperature=0,
    )
    assert token_ids(ranked(7), [request]) == [7]


# --- logits processors --------------------------------------------------------------------------


def test_processors_see_the_output_and_run_in_order():
    seen = []

    def first(ids, logits):
        seen.append((list(ids), logits.dtype, tuple(logits.shape)))
        ids.append(99)  # their own copy
        logits[:] = -1.0
        return logits

    def second(ids, logits):
        seen.append((list(ids), float(logits.sum())))
        return torch.where(torch.arange(VOCAB) == 5, 3.0, logits)

    plain = make_request(temperature=0)
    processed = make_request(output=[4, 8], temperature=0, logits_processors=[first, second])
    assert token_ids(ranked(7).repeat(2, 1), [processed, plain]) == [5, 7]
    assert seen == [([4, 8], torch.float32, (VOCAB,)), ([4, 8], -float(VOCAB))]
    assert processed.output_token_ids == [4, 8]


def test_penalties_and_bias_come_after_the_processors():
    request = make_request(
        prompt=[5],
        temperature=0,
        repetition_penalty=10.0,
        logit_bias={6: 1.0},
        logits_processors=lambda ids, logits: torch.where(torch.arange(VOCAB) == 5, 5.0, 0.0),
    )
    assert token_ids(ranked(7), [request]) == [6]  # 5 / 10 against 0 + 1


def fails(ids, logits):
    raise KeyError("of the user")


def leaves(ids, logits):
    raise SystemExit(3)


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        (fails, r"the logits processor fails raised KeyError: 'of the user'"),
        (leaves, r"the logits processor leaves raised SystemExit: 3"),
        (lambda ids, logits: None, r"<lambda> returned NoneType; expected the logits, a float32"),
        (lambda ids, logits: logits[:-1], r"returned a float32 tensor of shape \[59\]; expected"),
        (lambda ids, logits: logits[None], r"returned a float32 tensor of shape \[1, 60\]"),
        (lambda ids, logits: logits.double(), r"returned a float64 tensor of shape \[60\]"),
        (lambda ids, logits: logits / 0 * 0, r"the logits processors' result holds NaN"),
        (lambda ids, logits: logits - torch.inf, r"every token is banned"),
    ],
)
def test_a_failing_processor_fails_its_own_request_only(processor, message):
    requests = [
        make_request(temperature=0),
        make_request(temperature=0, output=[1, 2], logits_processors=processor, logprobs=1),
        make_request(temperature=0, logits_processors=lambda ids, logits: -logits),
    ]
    before, failed, after = sample(ranked(7).repeat(3, 1), requests)
    assert (before.token_id, after.token_id) == (7, 0)
    assert before.error is None
    assert after.error is None
    assert failed.token_id is None
    assert failed.logprobs is None
    with pytest.raises(RequestError, match="generation step 3: .*" + message) as raised:
        raise failed.error
    cause = raised.value.__cause__
    raised_by = {fails: KeyError, leaves: SystemExit}
    assert isinstance(cause, raised_by.get(processor, type(None)))


def test_a_processor_may_be_any_callable_and_use_gradients():
    class Steer:
        def __init__(self):
            self.shift = torch.nn.Parameter(torch.zeros(VOCAB))

        def __call__(self, ids, logits):
            return logits + self.shift

    request = make_request(temperature=0, logits_processors=Steer())
    with torch.enable_grad():
        assert token_ids(ranked(7), [request]) == [7]


# --- rows without a token -----------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nan_fails_its_own_request_only_and_names_the_step(temperature):
    logits = torch.randn(3, VOCAB)
    requests = [make_request(seed=i, temperature=temperature, output=[1] * 4) for i in range(3)]
    expected = token_ids(logits, requests)
    logits[1, 30] = torch.nan
    results = sample(logits, requests)
    assert [result.token_id for result in results] == [expected[0], None, expected[2]]
    assert str(results[1].error) == "generation step 5: the model's logits hold NaN"


def test_nothing_left_fails_its_own_request_only():
    requests = [
        make_request(allowed_token_ids=[4], banned=[[4]]),
        make_request(temperature=0),
    ]
    failed, fine = sample(ranked(7).repeat(2, 1), requests)
    assert "generation step 1: every token is banned" in str(failed.error)
    assert fine.token_id == 7


# --- log-probabilities --------------------------------------------------------------------------


def test_logprobs_are_of_the_models_own_logits():
    logits = torch.randn(4, VOCAB)
    exact = torch.log_softmax(logits.double(), -1)
    best = [int(token) for token in exact[2].argsort(descending=True)[:3]]
    requests = [
        make_request(logprobs=0, temperature=0.3, repetition_penalty=3.0, logit_bias={8: 50.0}),
        make_request(),
        make_request(logprobs=3, allowed_token_ids=[30]),
        make_request(logprobs=1, temperature=0, logits_processors=lambda ids, row: -row),
    ]
    biased, unasked, allowed, processed = sample(logits, requests)
    assert unasked.logprobs is None
    assert list(biased.logprobs) == [8]
    rank = 1 + int((exact[0] > exact[0, 8]).sum())
    assert biased.logprobs[8] == Logprob(pytest.approx(float(exact[0, 8]), abs=1e-6), rank, "<8>")

    assert allowed.token_id == 30
    assert list(allowed.logprobs) == [30, *(token for token in best if token != 30)]
    for place, token in enumerate(best):
        entry = allowed.logprobs[token]
        assert entry.rank == place + 1
        assert entry.logprob == pytest.approx(float(exact[2, token]), abs=1e-6)
    assert allowed.logprobs[30].rank == 1 + int((exact[2] > exact[2, 30]).sum())

    assert processed.token_id == int(logits[3].argmin())
    assert set(processed.logprobs) == {processed.token_id, int(logits[3].argmax())}
    assert processed.logprobs[processed.token_id].rank == VOCAB


def test_scores_given_tokens():
    logits = torch.randn(5, VOCAB)
    exact = torch.log_softmax(logits, -1)
    given = [3, 0, 59, 3, 7]
    scores = Sampler(Texts()).score(logits, given, 2)
    for row, token, entry in zip(exact, given, scores, strict=True):
        assert next(iter(entry)) == token
        assert set(entry) == {token, *row.topk(2).indices.tolist()}
        assert entry[token].logprob == pytest.approx(float(row[token]), abs=1e-5)
        assert entry[token].decoded_token == f"<{token}>"
    assert [list(entry) for entry in Sampler(Texts()).score(logits, given, 0)] == [
        [token] for token in given
    ]


def test_nothing_is_kept_of_a_request_that_is_gone():
    sampler = Sampler(Texts())
    request = make_request(repetition_penalty=1.5)
    sample(torch.randn(1, VOCAB), [request], sampler)
    assert len(sampler._states) == 1
    del request
    gc.collect()
    assert len(sampler._states) == 0
