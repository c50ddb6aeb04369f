"""Architectures without a file of their own against Hugging Face, in float32, eager attention."""

import random

import pytest
import torch
from safetensors.torch import load_file, save_file

import sglite
from sglite import LLM, ModelRegistry, SamplingParams
from sglite.interface.errors import CheckpointError, UnsupportedModelError
from sglite.models.transformers_refusals import refuse_rope
from tests.checkpoints import VOCAB_SIZE, hugging_face_logits
from tests.forward import Runner, assert_near
from tests.models.unregistered import REFUSED, RUN, make_config, make_model, save

LENGTHS = [1, 7, 16, 17, 40]
NEW_TOKENS = 16
TOLERANCE = 1e-4
GREEDY = SamplingParams(temperature=0, max_new_tokens=NEW_TOKENS, ignore_eos=True)


def prompts():
    draw = random.Random(0)
    made = [[draw.randrange(2, VOCAB_SIZE) for _ in range(length)] for length in LENGTHS]
    made[4][:16] = made[3][:16]
    return made


def model_of(llm):
    return llm._open.engine.runner.model


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


@pytest.fixture(autouse=True)
def nothing_registered(monkeypatch):
    """So that architectures take this path, whatever has a file of its own."""
    monkeypatch.setattr(ModelRegistry.models, "_classes", {})


@pytest.mark.parametrize("name", RUN)
def test_against_hugging_face(name, tmp_path):
    oracle = make_model(make_config(name))
    folder = save(oracle, tmp_path)
    with LLM(folder, kv_cache_tokens=2048, chunked_prefill_size=24) as llm:
        check_logits(model_of(llm), torch.float32, oracle)
        check_greedy(llm, oracle)
    report = sglite.compare(
        folder, reference=oracle, prompts=prompts()[2:], new_tokens=3, itself=False
    )
    assert report.passed, str(report)
    assert report.layers


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name, tmp_path):
    config_name, overrides, message = REFUSED[name]
    save(make_model(make_config(config_name, **overrides)), tmp_path)
    with pytest.raises(UnsupportedModelError, match=message):
        LLM(tmp_path, kv_cache_tokens=512)


def test_the_same_bits_whatever_shares_the_batch(tmp_path):
    """Alone, in a batch, in chunks and out of the cache; experts, soft caps and windows."""
    for name in ("Qwen3MoeConfig", "Gemma2Config", "PhiConfig"):
        folder = save(make_model(make_config(name)), tmp_path / name)
        with LLM(folder, kv_cache_tokens=4096) as llm:
            report = llm.check_invariance(
                prompts()[1:], new_tokens=4, batch_sizes=(2, 5), chunk_sizes=(5, 16)
            )
            assert report, f"{name}\n{report}"


def test_what_was_fused_is_told(tmp_path):
    folder = save(make_model(make_config("Gemma2Config")), tmp_path / "gemma2")
    with LLM(folder, kv_cache_tokens=512) as llm:
        text = repr(llm.describe())
    for line in (
        "Gemma2ForCausalLM",
        "Hugging Face's class",
        "layer 0: 4 heads, 2 kv heads of 16, scale 0.2041, window 9, soft cap 50",
        "layer 1: 4 heads, 2 kv heads of 16, scale 0.2041, soft cap 50",
        "2 x q_proj + k_proj + v_proj as one product",
        "2 x gate_proj + up_proj as one product",
        "9 RMSNorm by sglite's ops",
        "8 matrices packed for the CPU's kernels in float32",
        "1 matrices plain, as Hugging Face has them",
    ):
        assert line in text, f"{line!r} is not in\n{text}"


@pytest.mark.parametrize("name", ["LlamaConfig", "Qwen3Config", "SeedOssConfig"])
def test_layers_of_llamas_kind_run_as_one_op(name, tmp_path):
    oracle = make_model(make_config(name))
    folder = save(oracle, tmp_path)
    with LLM(folder, kv_cache_tokens=2048, chunked_prefill_size=24) as llm:
        assert "2 decoder layers, each one op" in repr(llm.describe())
        check_logits(model_of(llm), torch.float32, oracle)
        check_greedy(llm, oracle)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("GraniteConfig", {"residual_multiplier": 0.4}),
        ("SmolLM3Config", {"no_rope_layers": [1, 0]}),
        ("HeliumConfig", {}),  # its rotation pairs neighbours
    ],
)
def test_layers_that_differ_in_one_thing_are_left_as_they_are(name, values, tmp_path):
    oracle = make_model(make_config(name, **values))
    folder = save(oracle, tmp_path)
    with LLM(folder, kv_cache_tokens=2048, chunked_prefill_size=24) as llm:
        assert "one op" not in repr(llm.describe())
        check_logits(model_of(llm), torch.float32, oracle)


def test_int8_at_load_is_near(tmp_path):
    oracle = make_model(make_config("Glm4Config"))
    folder = save(oracle, tmp_path)
    with LLM(folder, kv_cache_tokens=2048, quantization="int8") as llm:
        assert "quantised to int8" in repr(llm.describe())
        runner = Runner(
            model_of(llm), model_of(llm).kv_layers, torch.float32, num_sequences=1, max_length=64
        )
        (logits,) = runner.run([prompts()[4]])
        assert_near(logits, hugging_face_logits(oracle, prompts()[4]), 0.05)


def test_a_broken_checkpoint_is_refused_by_the_names_of_its_tensors(tmp_path):
    folder = save(make_model(make_config("HeliumConfig")), tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.other.weight"] = tensors.pop("model.layers.0.mlp.up_proj.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"missing: .*up_proj") as caught:
        LLM(folder, kv_cache_tokens=512)
    assert "not used by the model: model.layers.0.mlp.other.weight" in str(caught.value)


def test_rope_by_the_longest_sequence_runs_below_its_original_length(tmp_path):
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    oracle = make_model(make_config("HeliumConfig", rope_parameters=rope))
    folder = save(oracle, tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"'dynamic' RoPE.* context_length=256"):
        LLM(folder, kv_cache_tokens=512, context_length=257)
    with LLM(folder, kv_cache_tokens=1024) as llm:
        assert llm.config.context_length == 256
        check_greedy(llm, oracle)


def test_rope_whose_original_length_is_a_small_part_has_to_be_asked_for():
    config = make_config("HeliumConfig")
    config.rope_parameters = {"rope_type": "longrope", "original_max_position_embeddings": 64}
    with pytest.raises(UnsupportedModelError, match=r"'longrope' RoPE.* context_length=64"):
        refuse_rope("Model", config, None)
    assert refuse_rope("Model", config, 60) == 64
