"""Vision-language models end to end: Hugging Face's logits and tokens, whatever the engine does."""

import pytest
import torch

from sglite import LLM, SamplingParams
from tests.vision_checkpoints import ORACLES, make_vision_checkpoint, picture, words

NEW_TOKENS = 16
TOLERANCE = 1e-4
GREEDY = SamplingParams(temperature=0, max_new_tokens=NEW_TOKENS, ignore_eos=True)
SCORED = SamplingParams(temperature=0, max_new_tokens=1, prompt_logprobs=0)


@pytest.fixture(scope="module", params=ORACLES)
def family(request, tmp_path_factory):
    """A checkpoint, and prompts with what Hugging Face makes of them."""
    return Family(request.param, tmp_path_factory.mktemp("vision"))


class Family:
    """The folder of a checkpoint, its oracle, and prompts with what it makes of them."""

    def __init__(self, name, folder):
        self.name = name
        self.folder = make_vision_checkpoint(folder, name)
        self.oracle = ORACLES[name](self.folder)
        self.expected = [Expected(self.oracle, *case) for case in cases(self.oracle.takes_videos)]
        self.prompts = [one.prompt for one in self.expected]

    def llm(self, **options):
        """Makes an `LLM` of the checkpoint."""
        return LLM(self.folder, **{"kv_cache_tokens": 8192, **options})


class Expected:
    """A prompt, and what Hugging Face makes of it."""

    def __init__(self, oracle, text, images, videos):
        self.prompt = {"text": text, "images": images, "videos": videos}
        self._oracle = oracle
        self._inputs = oracle.inputs(**self.prompt)
        self._margins = {}
        self.token_ids = self._inputs["input_ids"][0].tolist()
        self.logits = oracle.logits(self._inputs)
        self.logprobs = self.logits.log_softmax(-1)

    def logits_behind(self, tokens):
        """The logits of the prompt's last position and of tokens behind it."""
        inputs = self._oracle.extended(self._inputs, tokens)
        return self._oracle.logits(inputs)[len(self.token_ids) - 1 :]

    def margins(self, tokens):
        """By how much each token's logit is below the best one, relative to the largest logit.

        All zero: these are the tokens that greedy decoding gives, as each is the best one behind
        those before it.
        """
        tokens = tuple(tokens)
        if tokens not in self._margins:
            rows = self.logits_behind(tokens)[:-1]
            chosen = rows.gather(1, torch.tensor(tokens)[:, None])[:, 0]
            self._margins[tokens] = (rows.amax(1) - chosen) / rows.abs().amax(1)
        return self._margins[tokens]

    @property
    def targets(self):
        """The tokens that a prompt's logits are about, [tokens - 1, 1]."""
        return torch.tensor(self.token_ids[1:])[:, None]

    @property
    def scores(self):
        """The log-probabilities of the prompt's tokens behind the first."""
        return self.logprobs[:-1].gather(1, self.targets)[:, 0]


def scores_of(output):
    """The same of an output."""
    pairs = zip(output.prompt_logprobs[1:], output.prompt_token_ids[1:], strict=True)
    return torch.tensor([entry[token].logprob for entry, token in pairs])


def cases(with_videos):
    """Text alone, an image, several of different sizes, the same twice, an image at the end."""
    big, wide, small = picture(90, 70, 1), picture(200, 20, 2), picture(12, 17, 3)
    found = [
        (words(30, 1), [], []),
        (f"<image>{words(5, 2)}", [big], []),
        (f"{words(3, 3)}<image>{words(2, 4)}<image><image>{words(9, 5)}", [small, wide, big], []),
        (f"{words(20, 6)}<image>{words(4, 7)}<image>", [wide, wide], []),
    ]
    if with_videos:
        frames = [picture(60, 44, seed) for seed in range(5)]
        found += [
            (f"<video>{words(6, 8)}", [], [frames]),
            (f"{words(2, 9)}<image>{words(2, 10)}<video>{words(3, 11)}", [small], [frames[:2]]),
        ]
    return found


def assert_greedy(outputs, expected):
    """Tokens are the oracle's, but where its two best logits are within the tolerance."""
    for output, one in zip(outputs, expected, strict=True):
        assert len(output.token_ids) == NEW_TOKENS
        margins = one.margins(output.token_ids)
        assert (margins < TOLERANCE).all()
        assert (margins == 0).sum() > 0.9 * NEW_TOKENS, "near ties must be rare"


def test_prompts_are_told_apart(family):
    """Otherwise equal tokens would show nothing."""
    with family.llm() as llm:
        outputs = llm.generate(family.prompts, GREEDY)
    assert len({tuple(output.token_ids) for output in outputs}) == len(outputs)
    assert any(len(set(output.token_ids)) > 1 for output in outputs)


def test_whole_rows_of_every_position(family):
    """Those of a prompt as log-probabilities; its last and those behind it as logits."""
    vocab_size = family.expected[0].logits.shape[1]
    kept = [[] for _ in family.prompts]
    params = [
        SamplingParams(
            temperature=0,
            max_new_tokens=3,
            ignore_eos=True,
            prompt_logprobs=vocab_size,
            logits_processors=[keeper(rows)],
        )
        for rows in kept
    ]
    with family.llm(chunked_prefill_size=23) as llm:
        outputs = llm.generate(family.prompts, params)
    for output, rows, one in zip(outputs, kept, family.expected, strict=True):
        assert output.prompt_token_ids == one.token_ids
        assert_rows(prompt_rows(output, vocab_size), one.logprobs[:-1])
        wanted = one.logits_behind(output.token_ids[:-1])
        assert len(rows) == 3
        assert_rows(torch.stack(rows), wanted)


def keeper(rows):
    """A logits processor that keeps what it gets."""

    def keep(token_ids, logits):
        rows.append(logits.clone())
        return logits

    return keep


def prompt_rows(output, vocab_size):
    """Log-probabilities of all tokens at each position but the last, [tokens - 1, vocabulary]."""
    return torch.tensor(
        [
            [entry[token].logprob for token in range(vocab_size)]
            for entry in output.prompt_logprobs[1:]
        ]
    )


def assert_rows(actual, expected):
    """Each row is within the tolerance, relative to what is largest in it."""
    assert actual.shape == expected.shape
    errors = (actual - expected).abs().amax(1) / expected.abs().amax(1)
    assert errors.max() <= TOLERANCE, errors


@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize("chunk", [7, 1000])
def test_tokens_in_a_mixed_batch(family, prefix_cache, chunk):
    with family.llm(prefix_cache=prefix_cache, chunked_prefill_size=chunk) as llm:
        for _ in range(2):
            outputs = llm.generate(family.prompts, GREEDY)
            assert_greedy(outputs, family.expected)
        for output, one in zip(outputs, family.expected, strict=True):
            assert output.usage.cached_tokens == prefix_cache * cached_tokens(family, one)


def cached_tokens(family, one):
    """How many tokens of a prompt come out of the cache when it is there."""
    return len(one.token_ids) - 1


def test_tokens_after_preemption(family):
    longest_first = sorted(family.expected, key=lambda one: -len(one.token_ids))
    # Two prompts fit, but not what both generate.
    room = sum(len(one.token_ids) for one in longest_first[:2]) + NEW_TOKENS // 2
    with family.llm(kv_cache_tokens=room, chunked_prefill_size=50, page_size=4) as llm:
        for _ in range(2):
            outputs = llm.generate([one.prompt for one in longest_first], GREEDY)
            assert_greedy(outputs, longest_first)
        assert llm.stats()["preemptions"] > 0


def test_the_same_bits_whatever_shares_the_batch(family):
    params = SamplingParams(temperature=0, max_new_tokens=6, ignore_eos=True, logprobs=0)

    def run(llm, prompts):
        return [
            [entry[token].logprob for entry, token in zip(o.logprobs, o.token_ids, strict=True)]
            for o in llm.generate(prompts, params)
        ]

    with family.llm(prefix_cache=False) as llm:
        alone = [run(llm, [prompt])[0] for prompt in family.prompts]
        assert run(llm, family.prompts) == alone
    with family.llm(chunked_prefill_size=11) as llm:
        for _ in range(2):
            assert run(llm, family.prompts) == alone


def test_bfloat16_is_as_near_as_hugging_faces_own(family):
    rounded = ORACLES[family.name](family.folder, torch.bfloat16)
    with family.llm(dtype="bfloat16") as llm:
        outputs = llm.generate(family.prompts, SCORED)
    ours, theirs = [], []
    for output, one in zip(outputs, family.expected, strict=True):
        ours.append((scores_of(output) - one.scores).abs())
        other = rounded.logits(rounded.inputs(**one.prompt)).log_softmax(-1)
        theirs.append((other[:-1].gather(1, one.targets)[:, 0] - one.scores).abs())
    assert torch.cat(ours).mean() <= 2 * torch.cat(theirs).mean()


class TestCache:
    """What prompts with the same pictures share, and the others do not."""

    def test_the_same_picture_is_encoded_once_and_its_keys_are_shared(self, family):
        text = words(4, 20)
        with family.llm(page_size=4) as llm:
            first = llm.generate(f"{text}<image>{words(5, 21)}", images=picture(90, 70, 1))
            again = llm.generate(f"{text}<image>{words(5, 22)}", images=picture(90, 70, 1))
            stats = llm.stats()
            assert stats["images_encoded"] == 1
            assert 0 < stats["image_cache_bytes"] < 1 << 20
            common = common_length(first.prompt_token_ids, again.prompt_token_ids)
            assert again.usage.cached_tokens == common > len(llm.tokenizer.encode(text)) + 8

    def test_one_pixel_more_or_less_is_another_picture(self, family):
        one = picture(96, 72, 1)
        other = one.copy()
        other.putpixel((50, 40), tuple(255 - value for value in other.getpixel((50, 40))))
        prompt = f"{words(4, 20)}<image>{words(5, 21)}"
        with family.llm(page_size=4) as llm:
            first = llm.generate(prompt, images=one)
            second = llm.generate(prompt, images=other)
            assert first.prompt_token_ids == second.prompt_token_ids
            assert llm.stats()["images_encoded"] == 2
            start = first.prompt_token_ids.index(features_token(family))
            assert second.usage.cached_tokens == start

    def test_a_picture_that_left_the_cache_is_encoded_again(self, family):
        with family.llm(image_cache_bytes=0, chunked_prefill_size=5, prefix_cache=False) as llm:
            one = family.expected[1]
            for count in (1, 2):
                assert_greedy([llm.generate(one.prompt, GREEDY)], [one])
                assert llm.stats()["images_encoded"] == count


def features_token(family):
    """The id that stands for an image's rows."""
    return family.oracle.config.image_token_id


def common_length(first, second):
    """How many items two lists have in common from the start."""
    same = [a == b for a, b in zip(first, second, strict=False)]
    return same.index(False)
