"""Activations and the gated MLP against torch and Hugging Face."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaMLP

from sglite.interface.errors import UnsupportedModelError
from sglite.layers import GatedMLP, GeluAndMul, SiluAndMul
from sglite.layers.mlp import gated_activation


@pytest.mark.parametrize("name", ["silu", "swish", "gelu", "gelu_new", "gelu_pytorch_tanh"])
def test_activations_by_hugging_faces_names(name):
    x = torch.randn(5, 60)
    gate, up = x.chunk(2, -1)
    expected = ACT2FN[name](gate) * up
    torch.testing.assert_close(gated_activation(name)(x), expected, rtol=1e-5, atol=1e-5)


def test_the_exact_and_the_approximate_gelu_differ():
    x = torch.randn(5, 60)
    assert not torch.equal(GeluAndMul("none")(x), GeluAndMul("tanh")(x))
    assert not torch.equal(GeluAndMul("none")(x), SiluAndMul()(x))
    with pytest.raises(ValueError, match="approximate='erf' is not allowed"):
        GeluAndMul("erf")


def test_unknown_activations_are_refused_by_name():
    with pytest.raises(UnsupportedModelError, match="hidden_act='relu2' is not implemented; known"):
        GatedMLP(8, 16, "relu2")


@pytest.mark.parametrize("bias", [False, True])
def test_mlp_is_hugging_faces(bias):
    torch.manual_seed(0)
    theirs = LlamaMLP(LlamaConfig(hidden_size=64, intermediate_size=70, mlp_bias=bias))
    ours = GatedMLP(64, 70, bias=bias)
    parts = {"gate": theirs.gate_proj, "up": theirs.up_proj}
    for name, part in parts.items():
        start, stop = ours.gate_up_proj.segments[name]
        ours.gate_up_proj.matrix.write_rows(start, part.weight.data)
        if bias:
            ours.gate_up_proj.bias[start:stop] = part.bias.data
    ours.down_proj.weight = theirs.down_proj.weight
    if bias:
        ours.down_proj.bias.copy_(theirs.down_proj.bias.data)
    x, residual = torch.randn(7, 64), torch.randn(7, 64)
    torch.testing.assert_close(ours(x), theirs(x).detach(), rtol=1e-4, atol=1e-5)
    assert torch.equal(ours(x, residual=residual), residual + ours(x))
