"""Every native family against Hugging Face, in float32 with eager attention."""

import random

import pytest
import torch

from sglite.models.checkpoint import resolve_checkpoint
from sglite.models.loader import load_model
from tests.checkpoints import (
    CONFIGS,
    VOCAB_SIZE,
    hugging_face,
    hugging_face_logits,
    make_checkpoint,
)
from tests.forward import Runner, assert_near

LENGTHS = [1, 15, 16, 17, 33, 100]


@pytest.fixture(scope="module", params=CONFIGS)
def checkpoint(request, tmp_path_factory):
    """A loaded model, and the oracle's logits of the prompts."""
    folder = make_checkpoint(tmp_path_factory.mktemp("checkpoint"), request.param)
    oracle = hugging_face(folder)
    expected = [hugging_face_logits(oracle, token_ids) for token_ids in prompts()]
    return load_model(resolve_checkpoint(folder)), expected


def prompts(seed=0):
    generator = random.Random(seed)
    return [[generator.randrange(VOCAB_SIZE) for _ in range(length)] for length in LENGTHS]


def runner(loaded):
    return Runner(loaded.model, loaded.kv_layers, loaded.dtype, num_sequences=len(LENGTHS))


def test_prefill_of_a_batch(checkpoint):
    loaded, expected = checkpoint
    for actual, logits in zip(runner(loaded).run(prompts()), expected, strict=True):
        assert_near(actual, logits)


def test_chunks_and_decodes_mixed(checkpoint):
    loaded, expected = checkpoint
    run = runner(loaded)
    sizes = [1, 7, 1, 16, 5, 40]
    pieces: list[list] = [[] for _ in LENGTHS]
    rest = prompts()
    while any(rest):
        step = [token_ids[:size] for token_ids, size in zip(rest, sizes, strict=True)]
        rest = [token_ids[size:] for token_ids, size in zip(rest, sizes, strict=True)]
        for piece, logits in zip(pieces, run.run(step), strict=True):
            piece.append(logits)
    for piece, logits in zip(pieces, expected, strict=True):
        assert_near(torch.cat(piece), logits)


def test_last_rows_alone_are_the_same_bits(checkpoint):
    loaded, _ = checkpoint
    whole = runner(loaded).run(prompts())
    last = runner(loaded).run(prompts(), all_logits=False)
    for rows, row in zip(whole, last, strict=True):
        assert torch.equal(rows[-1:], row)


def test_a_prompt_alone_or_in_a_batch_is_the_same_bits(checkpoint):
    loaded, _ = checkpoint
    together = runner(loaded).run(prompts())
    for index, token_ids in enumerate(prompts()):
        run = Runner(loaded.model, loaded.kv_layers, loaded.dtype, num_sequences=1)
        assert torch.equal(run.run([token_ids])[0], together[index])


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3"])
def test_bfloat16_is_as_near_as_hugging_face(name, tmp_path):
    """Twice the error that Hugging Face's own bfloat16 has against its float32 at most."""
    folder = make_checkpoint(tmp_path, name, dtype=torch.bfloat16)
    loaded = load_model(resolve_checkpoint(folder))
    assert loaded.dtype == torch.bfloat16
    exact, low = hugging_face(folder), hugging_face(folder, torch.bfloat16)
    for token_ids, logits in zip(prompts(), runner(loaded).run(prompts()), strict=True):
        expected = hugging_face_logits(exact, token_ids)
        allowed = (hugging_face_logits(low, token_ids) - expected).abs().max()
        assert (logits - expected).abs().max() <= 2 * allowed
