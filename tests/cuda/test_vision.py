"""Models that see, on a GPU: Hugging Face's logits and tokens in float32."""

import pytest
import torch

from sglite import SamplingParams
from tests.multimodal.test_transformers_vision import check_logits_and_tokens
from tests.test_vision import GREEDY, Family, assert_greedy, assert_rows, prompt_rows
from tests.vision_checkpoints import ORACLES
from tests.vision_strangers import RUN


@pytest.fixture(autouse=True)
def whole_float32(monkeypatch):
    """By default torch has cuDNN round what goes into a float32 convolution to 10 bits."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(scope="module", params=ORACLES)
def family(request, tmp_path_factory, engine_device):
    """A checkpoint, and prompts with what Hugging Face makes of them on the CPU."""
    return Family(request.param, tmp_path_factory.mktemp("vision"))


@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_tokens_in_a_mixed_batch(family, cuda_graphs, engine_device):
    options = {"cuda_graphs": cuda_graphs, "chunked_prefill_size": 23}
    with family.llm(device=engine_device, **options) as llm:
        for _ in range(2):
            assert_greedy(llm.generate(family.prompts, GREEDY), family.expected)


def test_whole_rows_of_every_position(family, engine_device):
    vocab_size = family.expected[0].logits.shape[1]
    params = SamplingParams(temperature=0, max_new_tokens=1, prompt_logprobs=vocab_size)
    with family.llm(device=engine_device, chunked_prefill_size=23) as llm:
        outputs = llm.generate(family.prompts, params)
    for output, one in zip(outputs, family.expected, strict=True):
        assert_rows(prompt_rows(output, vocab_size), one.logprobs[:-1])


@pytest.mark.parametrize("name", RUN)
def test_hugging_faces_own_class(name, tmp_path, engine_device):
    check_logits_and_tokens(name, tmp_path, device=engine_device)
