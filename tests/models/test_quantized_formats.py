"""Checkpoints in quantised layouts: exact weights, and the logits of Hugging Face."""

import json
import re
import time
import weakref

import numpy as np
import pytest
import torch

from sglite.interface.errors import CheckpointError
from sglite.layers.linear import StackedLinear
from sglite.layers.weight import Weight
from sglite.models.quantized_weights import QuantizedPart, choose_layouts
from sglite.models.safetensors_file import SafetensorsFile
from sglite.models.targets import Target
from sglite.ops import PackedWeight, QuantizedLayout, QuantizedWeight
from tests.checkpoints import edit_json, hugging_face_logits, make_checkpoint
from tests.forward import assert_near
from tests.models.loading import load, logits_of, move_data_to_odd_places
from tests.quantized_checkpoints import awq, compressed, gptq, quantize_checkpoint

TOKEN_IDS = (5, 6, 7, 8, 300, 12, 99)
FORMATS = {
    "gptq": lambda r: gptq(r),
    "gptq-symmetric": lambda r: gptq(r, symmetric=True),
    "gptq-128": lambda r: gptq(r, group_size=128),
    "gptq-whole": lambda r: gptq(r, group_size=-1),
    "gptq-v2": lambda r: gptq(r, version=2),
    "gptq-8": lambda r: gptq(r, bits=8),
    "gptq-8-v2": lambda r: gptq(r, bits=8, version=2, group_size=64),
    "gptq-act-order": lambda r: gptq(r, shuffled=True),
    "gptq-act-order-64": lambda r: gptq(r, shuffled=True, group_size=64),
    "awq": lambda r: awq(r),
    "awq-64": lambda r: awq(r, group_size=64),
    "awq-128": lambda r: awq(r, group_size=128),
    "compressed-4": lambda r: compressed(r),
    "compressed-4-whole": lambda r: compressed(r, group_size=-1),
    "compressed-4-zeros": lambda r: compressed(r, symmetric=False, group_size=64),
    "compressed-4-tensor": lambda r: compressed(r, group_size=-1, is_whole=True),
    "compressed-8-tensor-zeros": lambda r: compressed(
        r, bits=8, group_size=-1, symmetric=False, is_whole=True
    ),
    "compressed-4-whole-zeros": lambda r: compressed(r, group_size=-1, symmetric=False),
    "compressed-4-plain-zeros": lambda r: compressed(
        r, symmetric=False, plain_zeros=True, group_size=64
    ),
    "compressed-4-index": lambda r: compressed(r, with_index=True, group_size=64),
    "compressed-8": lambda r: compressed(r, bits=8, group_size=-1),
    "compressed-8-group": lambda r: compressed(r, bits=8, group_size=64),
    "compressed-8-zeros": lambda r: compressed(r, bits=8, symmetric=False),
}


def part_weights(model):
    """The weight of each linear layer of the checkpoint, read back from the model."""
    weights = {}
    names = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "gate": "gate_proj", "up": "up_proj"}
    for path, module in model.named_modules():
        if isinstance(module, StackedLinear):
            parent = path.rpartition(".")[0]
            for segment in module.segments:
                weights[f"{parent}.{names[segment]}"] = module.segment_weight(segment)
        elif path.endswith(("o_proj", "down_proj")):
            weights[path] = module.weight
    return weights


def stored_kinds(model):
    """Of which kinds the stored linear layers are."""
    return {
        type(module.matrix.stored)
        for path, module in model.named_modules()
        if path.endswith("_proj")
    }


@pytest.mark.parametrize("name", FORMATS)
def test_weights_are_exact_and_logits_those_of_hugging_face(tmp_path, name):
    """The last group of `down_proj` is not full where groups are of 64 or 128."""
    folder = make_checkpoint(tmp_path, "llama-biases", hidden_size=128, intermediate_size=160)
    made = quantize_checkpoint(folder, *FORMATS[name](np.random.default_rng(0)))
    loaded = load(tmp_path, dtype="float32")
    assert (
        loaded.quantization
        == json.loads((tmp_path / "config.json").read_text())["quantization_config"]["quant_method"]
    )
    weights = part_weights(loaded.model)
    assert weights.keys() == made.weights.keys()
    for path, expected in made.weights.items():
        assert torch.equal(weights[path], torch.from_numpy(expected)), path
    # The order of columns that this one draws for q, k and v differs.
    is_mixed = name == "compressed-4-index"
    assert stored_kinds(loaded.model) == {QuantizedWeight} | ({PackedWeight} if is_mixed else set())
    assert_near(logits_of(loaded, TOKEN_IDS), hugging_face_logits(made.oracle, TOKEN_IDS))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_families_in_16_bits(tmp_path, family, dtype):
    """As near to float32 as Hugging Face's own model is with the same weights rounded."""
    made = quantize_checkpoint(make_checkpoint(tmp_path, family), *awq(np.random.default_rng(0)))
    loaded = load(tmp_path, dtype=dtype)
    assert loaded.dtype == getattr(torch, dtype)
    exact = hugging_face_logits(made.oracle, TOKEN_IDS)
    low = hugging_face_logits(made.oracle.to(loaded.dtype), TOKEN_IDS)
    error = (logits_of(loaded, TOKEN_IDS) - exact).abs().max()
    assert error <= 2 * (low - exact).abs().max()


def test_layers_that_are_left_out(tmp_path):
    """A whole layer, and one part of a stacked layer, whose other parts are then plain numbers."""
    config, quantize = compressed(np.random.default_rng(0))
    left_out = {"model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj"}
    config["ignore"] = ["lm_head", *left_out]
    made = quantize_checkpoint(
        make_checkpoint(tmp_path),
        config,
        lambda path, n, k: None if path in left_out else quantize(path, n, k),
    )
    loaded = load(tmp_path, dtype="float32")
    weights = part_weights(loaded.model)
    for path, expected in made.weights.items():
        assert torch.equal(weights[path], torch.from_numpy(expected)), path
    layers = loaded.model.model.layers
    assert type(layers[0].self_attn.qkv_proj.matrix.stored) is PackedWeight
    assert type(layers[1].self_attn.qkv_proj.matrix.stored) is QuantizedWeight
    assert type(layers[1].mlp.down_proj.matrix.stored) is PackedWeight
    assert_near(logits_of(loaded, TOKEN_IDS), hugging_face_logits(made.oracle, TOKEN_IDS))


def test_groups_of_layers_with_schemes_of_their_own(tmp_path):
    random = np.random.default_rng(0)
    config, four = compressed(random)
    other, eight = compressed(random, bits=8, group_size=-1)
    other = other["config_groups"]["group_0"] | {"targets": ["re:.*down_proj$"]}
    config["config_groups"]["group_1"] = other
    made = quantize_checkpoint(
        make_checkpoint(tmp_path),
        config,
        lambda path, n, k: (eight if "down" in path else four)(path, n, k),
    )
    loaded = load(tmp_path, dtype="float32")
    for path, weight in part_weights(loaded.model).items():
        assert torch.equal(weight, torch.from_numpy(made.weights[path])), path
    assert loaded.model.model.layers[0].mlp.down_proj.matrix.layout.bits == 8
    assert loaded.model.model.layers[0].self_attn.o_proj.matrix.layout.bits == 4
    assert_near(logits_of(loaded, TOKEN_IDS), hugging_face_logits(made.oracle, TOKEN_IDS))


def test_biases_of_zeros_that_the_model_does_not_have(tmp_path):
    name = "model.layers.1.self_attn.q_proj.bias"
    config, quantize = gptq(np.random.default_rng(0))
    bias = np.zeros(64, np.float16)
    quantize_checkpoint(make_checkpoint(tmp_path), config, quantize, extra={name: bias})
    load(tmp_path)
    bias[3] = 1
    quantize_checkpoint(make_checkpoint(tmp_path), config, quantize, extra={name: bias})
    with pytest.raises(CheckpointError, match=f"not used by the model: {re.escape(name)}"):
        load(tmp_path)


def test_a_config_under_its_older_name_counts(tmp_path):
    config, quantize = gptq(np.random.default_rng(0))
    quantize_checkpoint(make_checkpoint(tmp_path), config, quantize)
    edit_json(tmp_path / "config.json", {"quantization_config": None, "compression_config": config})
    assert load(tmp_path).quantization == "gptq"


@pytest.mark.parametrize("make", [gptq, compressed])
def test_data_at_odd_places(tmp_path, make, monkeypatch):
    """Tensors are copied, each once though rows are read piece by piece, and no copy is kept."""
    recipe = make(np.random.default_rng(0), symmetric=False)
    made = quantize_checkpoint(make_checkpoint(tmp_path, num_hidden_layers=1), *recipe)
    move_data_to_odd_places(tmp_path / "model.safetensors")
    monkeypatch.setattr("sglite.models.quantized_weights._UNPACKED_AT_ONCE", 32 * 64)
    read, copies = SafetensorsFile.read, {}

    def counting(file, entry):
        tensor = read(file, entry)
        copies.setdefault(entry.name, []).append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(SafetensorsFile, "read", counting)
    weights = part_weights(load(tmp_path, dtype="float32").model)
    for path, expected in made.weights.items():
        assert torch.equal(weights[path], torch.from_numpy(expected)), path
    # Zero points and shapes are looked at once more before anything is written.
    assert max(map(len, copies.values())) <= 2
    assert not any(tensor() is not None for refs in copies.values() for tensor in refs)


def test_zero_points_of_zero_may_be_there_where_a_layer_is_symmetric(tmp_path):
    config, quantize = compressed(np.random.default_rng(0))

    def with_zeros(path, n, k):
        weight, tensors = quantize(path, n, k)
        return weight, tensors | {"weight_zero_point": np.zeros((n, k // 32), np.int8)}

    made = quantize_checkpoint(make_checkpoint(tmp_path), config, with_zeros)
    logits = logits_of(load(tmp_path, dtype="float32"), TOKEN_IDS)
    assert_near(logits, hugging_face_logits(made.oracle, TOKEN_IDS))


def test_layouts_are_chosen_in_linear_time():
    """A mixture of 128 experts in 48 layers has thousands of matrices."""
    targets, parts = {}, {}
    layout = QuantizedLayout(4, 32)
    for index in range(5000):
        weight = Weight(96, 64, "")
        for number, name in enumerate("abc"):
            target = Target(weight, 32 * number, (32, 64))
            targets[f"{index}.{name}"] = target
            # One part of each tenth is left out.
            if index % 10 or name != "b":
                parts[f"{index}.{name}"] = QuantizedPart(target, None, layout, None)
    started = time.process_time()
    choose_layouts(targets, parts)
    assert time.process_time() - started < 2
    chosen = [targets[f"{index}.a"].tensor.layout for index in range(5000)]
    assert chosen == [None if index % 10 == 0 else layout for index in range(5000)]
