"""Quantised checkpoints that are refused, or asked for otherwise than they are, by name."""

import copy
import re

import numpy as np
import pytest
import torch

from sglite.interface.errors import CheckpointError, ConfigError, UnsupportedModelError
from tests.checkpoints import edit_json, make_checkpoint
from tests.models.loading import load
from tests.quantized_checkpoints import awq, compressed, gptq, quantize_checkpoint


def refused(tmp_path, error, message, config, quantize, **arguments):
    quantize_checkpoint(make_checkpoint(tmp_path), config, quantize)
    with pytest.raises(error, match=message) as caught:
        load(tmp_path, **arguments)
    assert error is ConfigError or str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("make", "changes", "message"),
    [
        (gptq, {"bits": 3}, "bits=3 is not implemented; known: 4, 8"),
        (gptq, {"checkpoint_format": "marlin"}, "checkpoint_format='marlin'"),
        (gptq, {"is_marlin_format": True}, "checkpoint_format='marlin'"),
        (gptq, {"dynamic": {"+:.*down": {"bits": 8}}}, "dynamic="),
        (gptq, {"group_size": 0}, "group_size=0"),
        (awq, {"version": "gemv"}, "version='gemv' is not implemented; known: gemm"),
        (awq, {"bits": 8}, "bits=8"),
        (awq, {"zero_point": False}, "zero_point=False"),
        (compressed, {"format": "int-quantized"}, "format='int-quantized'"),
        (compressed, {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
        (compressed, {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config"),
        (awq, {"quant_method": "bitsandbytes"}, r"quantised \('bitsandbytes'\)"),
        (awq, {"quant_method": None}, "which is not implemented; known: awq, compressed-tensors"),
    ],
)
def test_settings_that_are_refused(tmp_path, make, changes, message):
    config, quantize = make(np.random.default_rng(0))
    refused(tmp_path, UnsupportedModelError, message, config | changes, quantize)


def edited(values, path, value):
    """A copy of a config in which the value at the end of a path is another one."""
    values = copy.deepcopy(values)
    *above, last = path.split(".")
    holder = values
    for key in above:
        holder = holder[key]
    holder[last] = value
    return values


GROUP = "config_groups.group_0"


@pytest.mark.parametrize(
    ("make", "path", "value", "message"),
    [
        (gptq, "quant_method", ["gptq"], r"quantised \(\['gptq'\]\)"),
        (gptq, "quant_method", {"gptq": 1}, r"quantised \(\{'gptq': 1\}\)"),
        (gptq, "bits", "4", "bits='4' must be a whole number"),
        (gptq, "bits", 4.0, "bits=4.0 must be a whole number"),
        (gptq, "group_size", [32], r"group_size=\[32\] must be a whole number"),
        (gptq, "group_size", True, "group_size=True must be a whole number"),
        (gptq, "dynamic", "-:.*", "dynamic='-:.*' must be an object"),
        (awq, "bits", None, "bits=None is not implemented"),
        (compressed, "sparsity_config", "dense", "sparsity_config='dense' must be an object"),
        (compressed, "config_groups", [], r"config_groups=\[\] must be an object"),
        (compressed, "config_groups", {}, "there are no config_groups"),
        (compressed, GROUP, "Linear", r"config_groups\['group_0'\] has no weights"),
        (compressed, f"{GROUP}.targets", "Linear", "targets='Linear' must be a list"),
        (compressed, f"{GROUP}.targets", [4], r"targets=\[4\] must be a list of names"),
        (
            compressed,
            f"{GROUP}.targets",
            ["re:(x"],
            "'re:\\(x' in targets is no regular expression",
        ),
        (compressed, f"{GROUP}.targets", ["re:x{9999999999}"], "is no regular expression"),
        (compressed, f"{GROUP}.weights.num_bits", 4.0, "num_bits=4.0 must be a whole number"),
        (compressed, f"{GROUP}.weights.group_size", "32", "group_size='32' must be a whole number"),
        (compressed, f"{GROUP}.weights.symmetric", "yes", "symmetric='yes' must be true or false"),
    ],
)
def test_values_of_the_wrong_kind_are_named(folder, make, path, value, message):
    config, _ = make(np.random.default_rng(0))
    edit_json(folder / "config.json", {"quantization_config": edited(config, path, value)})
    with pytest.raises(CheckpointError, match=message) as caught:
        load(folder)
    assert str(folder / "config.json") in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_bits": 3}, "weights.num_bits=3"),
        ({"type": "float"}, "weights.type='float'"),
        ({"strategy": "block"}, "weights.strategy='block'"),
        ({"group_size": None}, "weights.group_size=None"),
    ],
)
def test_schemes_that_are_refused(tmp_path, changes, message):
    config, quantize = compressed(np.random.default_rng(0))
    config["config_groups"]["group_0"]["weights"].update(changes)
    refused(tmp_path, UnsupportedModelError, re.escape(message), config, quantize)


def test_quantised_activations_are_refused(tmp_path):
    config, quantize = compressed(np.random.default_rng(0))
    config["config_groups"]["group_0"]["input_activations"] = {"num_bits": 8}
    refused(tmp_path, UnsupportedModelError, "input_activations", config, quantize)


def test_groups_that_do_not_fit_the_kernel_are_refused(tmp_path):
    arguments = gptq(np.random.default_rng(0), group_size=20)
    message = r"model.layers.0.self_attn.q_proj: group size 20 .* is not implemented"
    refused(tmp_path, UnsupportedModelError, message, *arguments)


def test_an_index_of_uneven_groups_is_refused(tmp_path):
    config, quantize = gptq(np.random.default_rng(0), shuffled=True)

    def uneven(path, n, k):
        weight, tensors = quantize(path, n, k)
        tensors["g_idx"] = tensors["g_idx"].copy()
        tensors["g_idx"][:3] = 0
        return weight, tensors

    refused(tmp_path, UnsupportedModelError, "q_proj: g_idx puts columns", config, uneven)


def without(suffix):
    def change(tensors):
        del tensors[suffix]

    return change


def cut(suffix, axis):
    def change(tensors):
        tensors[suffix] = np.take(tensors[suffix], range(tensors[suffix].shape[axis] - 1), axis)

    return change


def one(suffix):
    def change(tensors):
        tensors[suffix] = tensors[suffix][:1, 0]

    return change


def zero_points(value):
    def change(tensors):
        tensors["weight_zero_point"] = np.full((64, 2), value, np.int8)

    return change


def twice(tensors):
    tensors["weight"] = np.zeros((64, 64), np.float16)


@pytest.mark.parametrize(
    ("make", "change", "message"),
    [
        (gptq, without("scales"), r"q_proj.scales is missing"),
        (gptq, twice, r"q_proj is there twice"),
        (gptq, cut("qweight", 0), r"q_proj.qweight is I32\[7, 64\]; expected int32\[8, 64\]"),
        (awq, without("qzeros"), r"q_proj.qzeros is missing"),
        (awq, cut("scales", 0), r"q_proj.scales is F16\[1, 64\]"),
        (compressed, without("weight_shape"), r"q_proj.weight_shape is missing"),
        (compressed, without("weight_scale"), r"q_proj.weight_scale is missing"),
        (compressed, cut("weight_scale", 1), r"q_proj.weight_scale is F16\[64, 1\]"),
        (compressed, one("weight_scale"), r"q_proj.weight_scale is F16\[1\]; .*\[64, 2\]"),
        (compressed, zero_points(1), r"q_proj.weight_zero_point .* that the layer is symmetric"),
        (compressed, without("weight_packed"), r"missing: model.layers.0.self_attn.q_proj.weight"),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path, make, change, message):
    refused(tmp_path, CheckpointError, message, *changing(change, *make(np.random.default_rng(0))))


def changing(change, config, quantize):
    """A recipe that changes the tensors of one layer."""

    def changed(path, n, k):
        weight, tensors = quantize(path, n, k)
        if path == "model.layers.0.self_attn.q_proj":
            change(tensors)
        return weight, tensors

    return config, changed


def test_the_config_must_say_how_a_layer_is_quantised(tmp_path):
    config, quantize = compressed(np.random.default_rng(0))
    config["config_groups"]["group_0"]["targets"] = ["re:.*down_proj"]
    refused(tmp_path, CheckpointError, "no group of config_groups", config, quantize)


@pytest.mark.parametrize("asked", ["int8", "int4", "awq"])
def test_another_method_than_the_checkpoints_is_refused(tmp_path, asked):
    message = rf"quantization='{asked}' contradicts the checkpoint.*\(gptq\)"
    arguments = gptq(np.random.default_rng(0))
    refused(tmp_path, ConfigError, message, *arguments, quantization=asked)
    assert load(tmp_path, quantization="gptq").quantization == "gptq"


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("gptq", "by 'int8', 'int4'; its config.json has no quantization_config"),
        ("int3", "quantization='int3'.*by 'int8', 'int4'"),
    ],
)
def test_a_plain_checkpoint_takes_int8_and_int4(tmp_path, asked, message):
    make_checkpoint(tmp_path, "llama")
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, quantization=asked)


def test_a_gpu_is_refused(tmp_path):
    make_checkpoint(tmp_path, "llama")
    with pytest.raises(UnsupportedModelError, match=r"\(int8\) run on the CPU alone"):
        load(tmp_path, quantization="int8", device=torch.device("cuda"))
