"""The mission's example: a registered subclass changes logits, by every way of registering it."""

import importlib.util
import json
import shutil

import pytest
import torch

from sglite import LLM, ModelRegistry, SamplingParams, UnsupportedModelError
from sglite.layers import PPProxyTensors
from sglite.models.llama import LlamaForCausalLM
from tests.checkpoints import DEMO_FOLDER, hugging_face, hugging_face_logits

PARAMS = SamplingParams(temperature=0, max_new_tokens=1, logprobs=8)


@pytest.fixture(scope="module")
def example(pytestconfig):
    path = pytestconfig.rootpath / "examples" / "llama_wrapper.py"
    spec = importlib.util.spec_from_file_location("llama_wrapper", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def expected():
    """Log-probabilities [vocabulary] of the first token with square roots, from Hugging Face."""
    model = hugging_face(DEMO_FOLDER)
    prompt = [0, 50, 60, 70, 80]
    logits = hugging_face_logits(model, prompt)[-1]
    assert (logits > 0).any()
    assert (logits < 0).any()
    return prompt, torch.where(logits > 0, logits.sqrt(), logits).log_softmax(-1)


def assert_square_roots(llm, expected):
    prompt, logprobs = expected
    (entry,) = llm.generate(prompt, PARAMS).logprobs
    best = logprobs.topk(8)
    for token_id, logprob in zip(best.indices.tolist(), best.values.tolist(), strict=True):
        assert entry[token_id].logprob == pytest.approx(logprob, abs=1e-3)


def test_named_in_the_call(example, expected):
    with LLM("demo", architecture="LlamaWrapper", dtype="float32") as llm:
        assert llm.config.architecture == "LlamaWrapper"
        assert_square_roots(llm, expected)


def test_named_in_config_json(example, expected, tmp_path):
    folder = shutil.copytree(DEMO_FOLDER, tmp_path / "llama_ckpt")
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = ["LlamaWrapper"]
    (folder / "config.json").write_text(json.dumps(config))
    with LLM(folder, dtype="float32") as llm:
        assert_square_roots(llm, expected)


def test_put_into_the_registry_by_hand(example, expected):
    ModelRegistry.models["ByHand"] = example.LlamaWrapper
    with LLM("demo", architecture="ByHand", dtype="float32") as llm:
        assert_square_roots(llm, expected)


def test_an_unknown_name_lists_the_known_ones(example):
    with pytest.raises(UnsupportedModelError, match="LlamaWraper.*Did you mean 'LlamaWrapper'"):
        LLM("demo", architecture="LlamaWraper")


@pytest.mark.parametrize(
    "argument", [{"pp_proxy_tensors": PPProxyTensors()}, {"get_embedding": True}]
)
def test_sglangs_further_arguments_are_refused_by_name_when_used(argument):
    with pytest.raises(UnsupportedModelError, match=next(iter(argument))):
        LlamaForCausalLM.forward(None, None, None, None, **argument)
