"""Architectures without a file of their own, on a GPU: Hugging Face's logits and tokens."""

import pytest

from sglite import LLM, SamplingParams
from tests.checkpoints import hugging_face_logits
from tests.forward import assert_near
from tests.models.test_transformers_path import TOLERANCE, check_greedy, prompts
from tests.models.unregistered import RUN, make_config, make_model, save
from tests.test_vision import prompt_rows


@pytest.mark.parametrize("name", RUN)
def test_against_hugging_face(name, tmp_path, engine_device):
    oracle = make_model(make_config(name))
    folder = save(oracle, tmp_path)
    vocab_size = oracle.config.get_text_config().vocab_size
    params = SamplingParams(temperature=0, max_new_tokens=1, prompt_logprobs=vocab_size)
    options = {"kv_cache_tokens": 2048, "chunked_prefill_size": 24, "device": engine_device}
    with LLM(folder, architecture="transformers", **options) as llm:
        outputs = llm.generate(prompts()[1:], params)
        check_greedy(llm, oracle)
    for output, token_ids in zip(outputs, prompts()[1:], strict=True):
        expected = hugging_face_logits(oracle, token_ids).log_softmax(-1)
        assert_near(prompt_rows(output, vocab_size), expected[:-1], TOLERANCE)
