"""Architectures without a file of their own against Hugging Face, in float32, eager attention."""

import random

import pytest
import torch

from sglite import LLM, SamplingParams
from tests.checkpoints import VOCAB_SIZE, hugging_face_logits
from tests.forward import Runner, assert_near
from tests.models.unregistered import RUN, make_config, make_model, save

LENGTHS = [1, 7, 16, 17, 40]
NEW_TOKENS = 32
TOLERANCE = 1e-4
GREEDY = SamplingParams(temperature=0, max_new_tokens=NEW_TOKENS, ignore_eos=True)


def prompts():
    draw = random.Random(0)
    made = [[draw.randrange(2, VOCAB_SIZE) for _ in range(length)] for length in LENGTHS]
    made[4][:16] = made[3][:16]
    return made


def model_of(llm):
    return llm._engine.runner.model


def check_logits(model, dtype, oracle):
    """Prefill of a batch in chunks that mix with decodes, every position's logits."""
    runner = Runner(model, model.kv_layers, dtype, num_sequences=len(LENGTHS), max_length=64)
    rest, pieces = prompts(), [[] for _ in LENGTHS]
    sizes = [1, 4, 1, 16, 13]
    while any(rest):
        step = [ids[:size] for ids, size in zip(rest, sizes, strict=True)]
        rest = [ids[size:] for ids, size in zip(rest, sizes, strict=True)]
        for piece, logits in zip(pieces, runner.run(step), strict=True):
            piece.append(logits)
    for token_ids, piece in zip(prompts(), pieces, strict=True):
        assert_near(torch.cat(piece), hugging_face_logits(oracle, token_ids), TOLERANCE)


def check_greedy(llm, oracle):
    """Each token is the best that Hugging Face has behind those before it, or nearly tied."""
    llm.generate(prompts()[2], GREEDY)
    outputs = llm.generate(prompts(), GREEDY)
    assert sum(output.usage.cached_tokens for output in outputs) > 0
    for prompt, output in zip(prompts(), outputs, strict=True):
        logits = hugging_face_logits(oracle, prompt + output.token_ids)[len(prompt) - 1 : -1]
        assert len(output.token_ids) == NEW_TOKENS
        behind = logits.amax(-1) - logits.gather(1, torch.tensor(output.token_ids)[:, None])[:, 0]
        assert (behind <= TOLERANCE * logits.abs().amax(-1)).all()


@pytest.mark.parametrize("name", RUN)
def test_against_hugging_face(name, tmp_path):
    oracle = make_model(make_config(name))
    folder = save(oracle, tmp_path)
    with LLM(folder, kv_cache_tokens=2048, chunked_prefill_size=24) as llm:
        check_logits(model_of(llm), torch.float32, oracle)
        check_greedy(llm, oracle)
