"""Generation against Hugging Face: every family, cache, chunk size and preemption."""

import random
from collections.abc import Sequence

import pytest
import torch

from sglite import LLM, SamplingParams
from tests.checkpoints import VOCAB_SIZE, hugging_face, make_checkpoint

FAMILIES = ["llama", "mistral", "qwen2", "qwen2-window", "qwen3"]
LENGTHS = [1, 7, 16, 17, 31, 48, 64, 90]
NEW_TOKENS = 32
GREEDY = SamplingParams(temperature=0, max_new_tokens=NEW_TOKENS, ignore_eos=True, logprobs=1)
# Where the oracle's two best logits are nearer than this (relative to its largest), either token is
# right, and what follows cannot be compared.
TOLERANCE = 1e-4


def prompts() -> list[list[int]]:
    """Eight prompts of mixed length; the longer ones share their first 30 tokens in pairs."""
    draw = random.Random(0)
    made = [[draw.randrange(2, VOCAB_SIZE) for _ in range(length)] for length in LENGTHS]
    made[5][:30], made[7][:30] = made[4][:30], made[6][:30]
    return made


def oracle_step(model, token_ids: Sequence[int]):
    """Hugging Face's logits behind every position, [n, vocabulary]."""
    with torch.no_grad():
        return model(torch.tensor([token_ids])).logits[0]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """A checkpoint's folder, and Hugging Face's greedy tokens with how sure it is of each."""
    folder = make_checkpoint(tmp_path_factory.mktemp("generation") / "model", request.param)
    model = hugging_face(folder)
    expected = []
    for prompt in prompts():
        with torch.no_grad():
            tokens = model.generate(
                torch.tensor([prompt]),
                max_new_tokens=NEW_TOKENS,
                min_new_tokens=NEW_TOKENS,
                do_sample=False,
                eos_token_id=None,
            )[0].tolist()
        logits = oracle_step(model, tokens)[len(prompt) - 1 : -1]
        best = logits.topk(2).values
        margins = (best[:, 0] - best[:, 1]) / logits.abs().amax(-1)
        expected.append((tokens[len(prompt) :], margins.tolist()))
    return folder, expected


def assert_same_tokens(outputs, expected):
    compared = 0
    for output, (tokens, margins) in zip(outputs, expected, strict=True):
        for actual, token, margin in zip(output.token_ids, tokens, margins, strict=True):
            if actual != token:
                assert margin < TOLERANCE, f"{actual} instead of {token}, margin {margin:.1e}"
                break
            compared += 1
    assert compared > 0.9 * len(outputs) * NEW_TOKENS, "near ties must be rare"


@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize("chunk", [16, 100_000])
@pytest.mark.parametrize("pool", ["large", "small"])
def test_greedy_tokens(family, prefix_cache, chunk, pool):
    folder, expected = family
    # The small pool holds the largest request and little more.
    kv_cache_tokens = 16_384 if pool == "large" else 144
    with LLM(
        folder,
        prefix_cache=prefix_cache,
        chunked_prefill_size=chunk,
        kv_cache_tokens=kv_cache_tokens,
    ) as llm:
        outputs = llm.generate(prompts(), GREEDY)
        assert_same_tokens(outputs, expected)
        assert (llm.stats()["preemptions"] > 0) == (pool == "small")
        if prefix_cache and pool == "large":
            again = llm.generate(prompts(), GREEDY)
            assert_same_tokens(again, expected)
            assert all(
                o.usage.cached_tokens == len(p) - 1 for o, p in zip(again, prompts(), strict=True)
            )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_is_as_near_as_hugging_faces_own(family, dtype):
    folder, expected = family
    exact, rounded = hugging_face(folder), hugging_face(folder, getattr(torch, dtype))
    prompt_params = SamplingParams(max_new_tokens=1, prompt_logprobs=0)
    texts = [prompt + tokens for prompt, (tokens, _) in zip(prompts(), expected, strict=True)]
    with LLM(folder, dtype=dtype, kv_cache_tokens=4096) as llm:
        outputs = llm.generate(texts, prompt_params)
    ours, theirs = [], []
    for text, output in zip(texts, outputs, strict=True):
        targets = torch.tensor(text[1:])[:, None]
        wanted = oracle_step(exact, text)[:-1].log_softmax(-1).gather(1, targets)[:, 0]
        other = oracle_step(rounded, text)[:-1].float().log_softmax(-1).gather(1, targets)[:, 0]
        scored = torch.tensor(
            [
                entry[token].logprob
                for entry, token in zip(output.prompt_logprobs[1:], text[1:], strict=True)
            ]
        )
        ours.append((scored - wanted).abs())
        theirs.append((other - wanted).abs())
    ours, theirs = torch.cat(ours), torch.cat(theirs)
    assert ours.mean() <= 2 * theirs.mean()
    assert ours.max() <= 2 * theirs.max()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", ["llama", "qwen2-window"])
def test_the_same_bits_whatever_shares_the_batch(tmp_path, name, dtype):
    """Log-probabilities are equal to the last bit: alone, batched, in chunks and cached.

    Every native model: `LLM.check_invariance`, in test_invariance.py.
    """
    folder = make_checkpoint(tmp_path, name)
    several = prompts()

    def run(order, llm):
        outputs = llm.generate([several[index] for index in order], GREEDY)
        return {
            index: [
                (token, entry[token].logprob)
                for token, entry in zip(o.token_ids, o.logprobs, strict=True)
            ]
            for index, o in zip(order, outputs, strict=True)
        }

    with LLM(folder, dtype=dtype, kv_cache_tokens=16_384, prefix_cache=False) as llm:
        alone = {}
        for index in range(len(several)):
            alone |= run([index], llm)
        assert run(range(8), llm) == alone
    with LLM(folder, dtype=dtype, kv_cache_tokens=16_384, chunked_prefill_size=13) as llm:
        assert run([7, 6, 5, 4, 3, 2, 1, 0], llm) == alone
        assert run(range(8), llm) == alone  # now everything comes out of the cache
    with LLM(folder, dtype=dtype, kv_cache_tokens=144, num_threads=1, page_size=4) as llm:
        assert run(range(8), llm) == alone
        assert llm.stats()["preemptions"] > 0
