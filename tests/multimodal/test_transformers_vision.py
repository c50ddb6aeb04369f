"""Vision-language models that Hugging Face's own class runs: its logits and tokens, or refused."""

import pytest

from sglite import LLM, SamplingParams, UnsupportedModelError
from tests.test_vision import TOLERANCE, scores_of
from tests.vision_checkpoints import picture, words
from tests.vision_strangers import REFUSED, RUN, StrangerOracle, make_stranger

COUNT = 10
PLAIN = SamplingParams(temperature=0, max_new_tokens=COUNT, ignore_eos=True)
PARAMS = SamplingParams(temperature=0, max_new_tokens=COUNT, prompt_logprobs=0, ignore_eos=True)


def prompts():
    """Text alone, an image, two of different sizes, one at the end twice."""
    big, tall = picture(90, 70, 1), picture(60, 90, 3)
    texts = (words(12, 1), f"<image>{words(5, 2)}")
    texts += (f"{words(3, 3)}<image>{words(2, 4)}<image>{words(9, 5)}", f"{words(4, 6)}<image>")
    images = ([], [big], [tall, big], [tall])
    return [{"text": t, "images": i, "videos": []} for t, i in zip(texts, images, strict=True)]


@pytest.mark.parametrize("name", RUN)
def test_hugging_faces_logits_and_tokens(name, tmp_path):
    folder = make_stranger(tmp_path, RUN[name])
    oracle = StrangerOracle(folder, RUN[name])
    inputs = [oracle.inputs(**prompt) for prompt in prompts()]
    expected = [oracle.logits(one).log_softmax(-1) for one in inputs]
    tokens = [oracle.greedy(one, COUNT) for one in inputs]
    with LLM(folder, kv_cache_tokens=8192, chunked_prefill_size=23) as llm:
        for is_again in (False, True):
            params = PARAMS if not is_again else PLAIN
            outputs = llm.generate(prompts(), params)
            for output, one, logprobs, (best, gaps) in zip(
                outputs, inputs, expected, tokens, strict=True
            ):
                ids = one["input_ids"][0]
                assert output.prompt_token_ids == ids.tolist()
                if not is_again:
                    wanted = logprobs[:-1].gather(1, ids[1:, None])[:, 0]
                    error = (scores_of(output) - wanted).abs().max()
                    assert error <= TOLERANCE * logprobs.abs().max()
                else:
                    assert output.usage.cached_tokens == len(ids) - 1
                for actual, token, gap in zip(output.token_ids, best, gaps, strict=True):
                    if actual != token:
                        assert gap < TOLERANCE
                        break


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_right_is_refused_by_name(name, tmp_path):
    one, reason = REFUSED[name]
    folder = make_stranger(tmp_path, one)
    with pytest.raises(UnsupportedModelError, match=reason):
        LLM(folder)
