"""Quantised checkpoints beyond plain decoders: experts, fused layers, heads, vision towers."""

import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sglite import LLM
from sglite.interface.errors import CheckpointError
from sglite.layers import Router
from sglite.layers.weight import Weight
from sglite.models.targets import targets_of
from sglite.ops import PackedWeight, QuantizedWeight
from tests.checkpoints import hugging_face_logits, make_checkpoint
from tests.forward import assert_near
from tests.models.loading import load, logits_of
from tests.quantized_checkpoints import (
    LINEAR,
    WEIGHT_FILE,
    awq,
    compressed,
    gptq,
    quantize_checkpoint,
)
from tests.test_vision import SCORED, Expected, scores_of
from tests.vision_checkpoints import ORACLES, make_vision_checkpoint, picture, words

TOKEN_IDS = (5, 6, 7, 8, 300, 12, 99)
FORMATS = {
    "gptq": gptq,
    "gptq-act-order": lambda random: gptq(random, shuffled=True),
    "awq": awq,
    "compressed": lambda random: compressed(random, symmetric=False),
}


def stored_weights(model):
    """All matrices by the names that the checkpoint has for them."""
    return {
        name.removesuffix(".weight"): target.tensor.read_rows(
            target.start, target.start + target.shape[0]
        ).view(target.shape)
        for name, target in targets_of(model).items()
        if isinstance(target.tensor, Weight)
    }


def check(loaded, made):
    """Weights are exact, and logits those of Hugging Face."""
    weights = stored_weights(loaded.model)
    for path, expected in made.weights.items():
        assert torch.equal(weights[path], torch.from_numpy(expected)), path
    assert_near(logits_of(loaded, TOKEN_IDS), hugging_face_logits(made.oracle, TOKEN_IDS))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("family", ["mixtral", "qwen2-moe", "qwen3-moe"])
def test_experts(tmp_path, family, name):
    """Those of Qwen's have 40 inputs to `down_proj`, so that the last group has 8."""
    recipe = FORMATS[name](np.random.default_rng(0))
    made = quantize_checkpoint(make_checkpoint(tmp_path, family, num_hidden_layers=2), *recipe)
    loaded = load(tmp_path, dtype="float32")
    num_experts = 5 if family == "mixtral" else 7
    assert len(made.weights) == 2 * (4 + 3 * num_experts + 3 * (family == "qwen2-moe"))
    check(loaded, made)
    for path, module in loaded.model.named_modules():
        if hasattr(module, "matrix"):
            is_plain = isinstance(module, Router) or path in ("model.embed_tokens", "lm_head")
            kind = PackedWeight if is_plain else QuantizedWeight
            assert type(module.matrix.stored) is kind, path


@pytest.mark.parametrize("name", FORMATS)
def test_layers_that_the_checkpoint_has_fused(tmp_path, name):
    made = quantize_checkpoint(
        make_checkpoint(tmp_path, "phi3"), *FORMATS[name](np.random.default_rng(0))
    )
    assert {path.rpartition(".")[2] for path in made.weights} == {
        *("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
    }
    loaded = load(tmp_path, dtype="float32")
    check(loaded, made)
    assert type(loaded.model.model.layers[0].self_attn.qkv_proj.matrix.stored) is QuantizedWeight


@pytest.mark.parametrize("name", FORMATS)
def test_a_quantised_head(tmp_path, name):
    recipe = FORMATS[name](np.random.default_rng(0))
    folder = make_checkpoint(tmp_path, "llama")
    made = quantize_checkpoint(folder, *recipe, layers=rf"{LINEAR}|^lm_head$")
    assert "lm_head" in made.weights
    loaded = load(tmp_path, dtype="float32")
    check(loaded, made)
    assert type(loaded.model.lm_head.matrix.stored) is QuantizedWeight
    assert type(loaded.model.model.embed_tokens.matrix.stored) is PackedWeight


def test_a_tied_head_that_is_quantised_alone_is_refused(tmp_path):
    """The untied checkpoint of before, with a config that ties its head."""
    recipe = gptq(np.random.default_rng(0))
    quantize_checkpoint(make_checkpoint(tmp_path, "llama-tied"), *recipe)
    folder = make_checkpoint(tmp_path / "untied", "llama")
    untied = quantize_checkpoint(folder, *recipe, layers=rf"{LINEAR}|^lm_head$")
    tensors = load_file(untied.folder / WEIGHT_FILE)
    save_file(tensors, tmp_path / WEIGHT_FILE, metadata={"format": "pt"})
    message = r"model.safetensors: lm_head is quantised apart from model.embed_tokens.weight"
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)


def prompts():
    """Text alone, and two pictures."""
    return [
        (words(30, 1), [], []),
        (f"{words(3, 3)}<image>{words(2, 4)}<image>", [picture(90, 70, 1), picture(30, 50, 2)], []),
    ]


def check_vision(folder, plain, name, **options):
    """Log-probabilities of prompts are those of Hugging Face for the checkpoint `plain`."""
    oracle = ORACLES[name](plain)
    expected = [Expected(oracle, *prompt) for prompt in prompts()]
    with LLM(folder, dtype="float32", kv_cache_tokens=2048, **options) as llm:
        outputs = llm.generate([one.prompt for one in expected], SCORED)
    for output, one in zip(outputs, expected, strict=True):
        assert output.prompt_token_ids == one.token_ids
        error = (scores_of(output) - one.scores).abs().max()
        assert error <= 1e-4 * one.logprobs.abs().max()


def test_a_vision_tower_that_is_left_plain(tmp_path):
    """As the family's own AWQ checkpoints are."""
    config, quantize = awq(np.random.default_rng(0))
    config["modules_to_not_convert"] = ["visual"]
    folder = make_vision_checkpoint(tmp_path, "qwen2.5-vl")
    made = quantize_checkpoint(folder, config, quantize, layers=r"^model[.].*_proj$")
    assert len(made.weights) == 2 * 7
    model = load(folder, dtype="float32").model
    assert type(model.visual.blocks[0].attn.qkv.matrix.stored) is PackedWeight
    assert type(model.model.layers[0].mlp.gate_up_proj.matrix.stored) is QuantizedWeight
    check_vision(folder, made.plain, "qwen2.5-vl")


def test_patterns_are_about_the_names_of_the_checkpoint(tmp_path):
    """Which are not those that the model's class has for its parts."""
    folder = make_vision_checkpoint(tmp_path, "qwen2-vl")
    tensors = {
        re.sub("^visual", "model.visual", re.sub("^model[.]", "model.language_model.", name)): value
        for name, value in load_file(folder / WEIGHT_FILE).items()
    }
    save_file(tensors, folder / WEIGHT_FILE, metadata={"format": "pt"})
    random = np.random.default_rng(0)
    config, four = compressed(random)
    other, eight = compressed(random, bits=8, group_size=-1)
    groups = {"group_0": config["config_groups"]["group_0"]}
    groups["group_1"] = other["config_groups"]["group_0"]
    for index, group in enumerate(groups.values()):
        group["targets"] = [rf"re:model\.language_model\.layers\.{index}\."]
    config["config_groups"] = groups
    config["ignore"] = ["lm_head", r"re:model\.visual.*"]
    made = quantize_checkpoint(
        folder,
        config,
        lambda path, n, k: (four if "layers.0." in path else eight)(path, n, k),
        layers=r"language_model.*_proj$",
    )
    layers = load(folder, dtype="float32").model.model.layers
    assert [layer.mlp.down_proj.matrix.layout.bits for layer in layers] == [4, 8]
    check_vision(folder, made.plain, "qwen2-vl")


@pytest.mark.parametrize("name", ["qwen2.5-vl", "llava"])
def test_a_vision_model_that_is_quantised_at_load(tmp_path, name):
    """Hugging Face's log-probabilities with the weights as they read back."""
    folder = make_vision_checkpoint(tmp_path / "as-it-is", name)
    plain = make_vision_checkpoint(tmp_path / "rounded", name)
    weights = stored_weights(load(folder, quantization="int8").model)
    tensors = load_file(plain / WEIGHT_FILE)
    differing = 0
    for path in tensors:
        if (weight := weights.get(path.removesuffix(".weight"))) is not None:
            differing += not torch.equal(weight, tensors[path])
            tensors[path] = weight
    assert differing > 20
    save_file(tensors, plain / WEIGHT_FILE, metadata={"format": "pt"})
    check_vision(folder, plain, name, quantization="int8")


@pytest.mark.parametrize("method", ["int8", "int4"])
def test_routers_stay_plain_in_hugging_faces_own_classes(tmp_path, method):
    """Of those of Qwen2-MoE the gate of the shared expert alone is a linear layer there."""
    make_checkpoint(tmp_path, "qwen2-moe", num_hidden_layers=2)
    loaded = load(tmp_path, quantization=method, architecture="transformers")
    gates = {
        path: module
        for path, module in loaded.model.named_modules()
        if path.endswith(".shared_expert_gate")
    }
    assert len(gates) == 2
    tensors = load_file(tmp_path / WEIGHT_FILE)
    for path, module in gates.items():
        name = f"model.{path[path.index('layers.') :]}.weight"
        assert torch.equal(module.weight, tensors[name])
    assert any(
        type(module.matrix.stored) is QuantizedWeight
        for path, module in loaded.model.named_modules()
        if "shared_expert." in path and hasattr(module, "matrix")
    )
