"""Vision-language models that Hugging Face's own class runs: its logits and tokens, or refused."""

import pytest
import torch

from sglite import LLM, CheckpointError, SamplingParams, UnsupportedModelError
from sglite.models.transformers_vision import learn_images, weights_on
from tests.test_vision import TOLERANCE, assert_rows, prompt_rows, scores_of
from tests.vision_checkpoints import picture, words
from tests.vision_strangers import REFUSED, RUN, StrangerOracle, make_stranger

COUNT = 10
PARAMS = SamplingParams(temperature=0, max_new_tokens=COUNT, ignore_eos=True)


def prompts():
    """Text alone, an image, two of different sizes, one at the end twice."""
    big, tall = picture(90, 70, 1), picture(60, 90, 3)
    texts = (words(12, 1), f"<image>{words(5, 2)}")
    texts += (f"{words(3, 3)}<image>{words(2, 4)}<image>{words(9, 5)}", f"{words(4, 6)}<image>")
    images = ([], [big], [tall, big], [tall])
    return [{"text": t, "images": i, "videos": []} for t, i in zip(texts, images, strict=True)]


def check_logits_and_tokens(name, folder, **options):
    """Prompts of several kinds, computed and out of the cache; `options` are of the LLM."""
    make_stranger(folder, RUN[name])
    oracle = StrangerOracle(folder, RUN[name])
    inputs = [oracle.inputs(**prompt) for prompt in prompts()]
    expected = [oracle.logits(one).log_softmax(-1) for one in inputs]
    tokens = [oracle.greedy(one, COUNT) for one in inputs]
    with LLM(folder, kv_cache_tokens=8192, chunked_prefill_size=23, **options) as llm:
        for is_again in (False, True):
            # Whole rows of text alone and of a picture, which are slow to hand over.
            vocab_size = expected[0].shape[1]
            counts = (vocab_size, vocab_size, 0, 0)
            scored = [{**PARAMS.to_dict(), "prompt_logprobs": count} for count in counts]
            outputs = llm.generate(prompts(), PARAMS if is_again else scored)
            for output, one, logprobs, (best, gaps) in zip(
                outputs, inputs, expected, tokens, strict=True
            ):
                ids = one["input_ids"][0]
                assert output.prompt_token_ids == ids.tolist()
                if is_again:
                    assert output.usage.cached_tokens == len(ids) - 1
                elif len(output.prompt_logprobs[1]) == vocab_size:
                    assert_rows(prompt_rows(output, vocab_size), logprobs[:-1])
                else:
                    wanted = logprobs[:-1].gather(1, ids[1:, None])[:, 0]
                    error = (scores_of(output) - wanted).abs().max()
                    assert error <= TOLERANCE * logprobs.abs().max()
                assert len(output.token_ids) == COUNT
                for actual, token, gap in zip(output.token_ids, best, gaps, strict=False):
                    if actual != token:
                        assert gap < TOLERANCE
                        break


@pytest.mark.parametrize("name", RUN)
def test_hugging_faces_logits_and_tokens(name, tmp_path):
    check_logits_and_tokens(name, tmp_path)


@pytest.mark.parametrize("name", ["idefics3", "internvl"])
def test_a_model_is_tried_with_one_tile(name, tmp_path):
    folder = make_stranger(tmp_path, RUN[name])
    oracle = StrangerOracle(folder, RUN[name])
    found = learn_images(oracle.model, oracle.image_processor, torch.device("cpu"))
    assert len(found.features) == 9
    assert found.data["pixel_values"].shape[-4:] == (1, 3, 24, 24)


def test_weights_are_lent_to_a_device():
    module = torch.nn.Sequential(
        torch.nn.Linear(3, 3), torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3)
    )
    module[1].weight = module[0].weight
    before = {name: tensor.data_ptr() for name, tensor in module.state_dict().items()}
    with weights_on(module, torch.device("meta")):
        assert all(tensor.is_meta for tensor in module.state_dict().values())
        assert module[1].weight is module[0].weight
    assert {name: tensor.data_ptr() for name, tensor in module.state_dict().items()} == before


def test_a_missing_image_processor_is_named(tmp_path):
    folder = make_stranger(tmp_path, RUN["idefics3"])
    (folder / "preprocessor_config.json").unlink()
    (folder / "processor_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json nor processor_config"):
        LLM(folder)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_right_is_refused_by_name(name, tmp_path):
    one, reason = REFUSED[name]
    folder = make_stranger(tmp_path, one)
    with pytest.raises(UnsupportedModelError, match=reason):
        LLM(folder)
