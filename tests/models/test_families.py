"""Every native family against Hugging Face, in float32 with eager attention."""

import json
import random

import pytest
import torch

from sglite import LLM
from sglite.models.checkpoint import resolve_checkpoint
from sglite.models.loader import load_model
from tests.checkpoints import (
    CONFIGS,
    FAMILIES,
    VOCAB_SIZE,
    edit_json,
    hugging_face,
    hugging_face_logits,
    make_checkpoint,
)
from tests.forward import Runner, assert_near
from tests.models.loading import load, logits_of

LENGTHS = [1, 15, 16, 17, 33, 100]
_OTHERS = ("LlamaConfig", "MistralConfig", "Qwen2Config", "Qwen3Config")
FURTHER = [name for name in FAMILIES if CONFIGS[name][0] not in _OTHERS]
NEW_TOKENS = 16
# Where the oracle's two best logits are nearer than this (relative to its largest), either token is
# right.
NEAR_TIE = 1e-4


@pytest.fixture(scope="module", params=CONFIGS)
def model(request, tmp_path_factory):
    """A checkpoint's folder, and the oracle."""
    folder = make_checkpoint(tmp_path_factory.mktemp("checkpoint"), request.param)
    return folder, hugging_face(folder)


@pytest.fixture(scope="module")
def checkpoint(model):
    """A loaded model, and the oracle's logits of the prompts."""
    folder, oracle = model
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


@pytest.mark.parametrize("model", FURTHER, indirect=True)
def test_greedy_tokens_of_a_batch(model):
    """All at once, then again out of the prefix cache; the other families: test_generation.py."""
    folder, oracle = model
    with LLM(folder, kv_cache_tokens=4096, num_threads=1) as llm:
        outputs, again = (
            llm.generate(prompts(), temperature=0, max_new_tokens=NEW_TOKENS, ignore_eos=True)
            for _ in range(2)
        )
    assert [output.usage.cached_tokens for output in again] == [n - 1 for n in LENGTHS]
    assert [output.token_ids for output in again] == [output.token_ids for output in outputs]
    for prompt, output in zip(prompts(), outputs, strict=True):
        logits = hugging_face_logits(oracle, prompt + output.token_ids)[len(prompt) - 1 : -1]
        lead = logits.amax(-1) - logits.gather(1, torch.tensor(output.token_ids)[:, None])[:, 0]
        assert (lead <= NEAR_TIE * logits.abs().amax(-1)).all()


@pytest.mark.parametrize("name", FAMILIES)
def test_bfloat16_is_as_near_as_hugging_face(name, tmp_path):
    """Twice the error that Hugging Face's own bfloat16 has against its float32 at most.

    The largest error of each prompt; with experts, of which a rounding may choose another, the mean
    over all prompts.
    """
    folder = make_checkpoint(tmp_path, name, dtype=torch.bfloat16)
    loaded = load_model(resolve_checkpoint(folder))
    assert loaded.dtype == torch.bfloat16
    exact, low = hugging_face(folder), hugging_face(folder, torch.bfloat16)
    ours, theirs = [], []
    for token_ids, logits in zip(prompts(), runner(loaded).run(prompts()), strict=True):
        expected = hugging_face_logits(exact, token_ids)
        ours.append((logits - expected).abs())
        theirs.append((hugging_face_logits(low, token_ids) - expected).abs())
    if hasattr(loaded.config, "num_experts_per_tok"):
        assert torch.cat(ours).mean() <= 2 * torch.cat(theirs).mean()
    else:
        assert all(o.max() <= 2 * t.max() for o, t in zip(ours, theirs, strict=True))


def test_longrope_with_a_long_context(tmp_path):
    """A text longer than the original length, as Hugging Face runs it."""
    folder = make_checkpoint(tmp_path, "phi3-long")
    draw = random.Random(1)
    token_ids = [draw.randrange(VOCAB_SIZE) for _ in range(200)]
    expected = hugging_face_logits(hugging_face(folder), token_ids)
    assert_near(logits_of(load(folder, context_length=201), token_ids), expected)


# What `config.json` had before transformers 5, and still has on the Hub.
OLDER = {
    "gemma2": {"layer_types": None},
    "gemma3": {
        "layer_types": None,
        "sliding_window_pattern": 2,
        "rope_theta": 1e6,
        "rope_local_base_freq": 100.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    "phi3-long": {
        "partial_rotary_factor": 0.5,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0, 1.1, 1.3, 1.7],
            "long_factor": [1.0, 2.0, 4.5, 9.0],
        },
    },
    "glm": {"partial_rotary_factor": 0.5},
    "glm4": {"partial_rotary_factor": 0.5},
    "smollm3": {"layer_types": None, "no_rope_layers": [1, 0, 1]},
    "cohere2": {"layer_types": None, "sliding_window_pattern": 2, "head_dim": None},
    "qwen3-moe": {"num_experts": 7, "num_local_experts": None},
}


@pytest.mark.parametrize("name", OLDER)
def test_older_spellings_of_the_config(name, tmp_path):
    folder = make_checkpoint(tmp_path, name)
    expected = logits_of(load(folder), range(40))
    rope = json.loads((folder / "config.json").read_text())["rope_parameters"]
    theta = {"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {}
    edit_json(folder / "config.json", {"rope_parameters": None, **theta, **OLDER[name]})
    assert torch.equal(logits_of(load(folder), range(40)), expected)
