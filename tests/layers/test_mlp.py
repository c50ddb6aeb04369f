"""Activations and the gated MLP against torch and Hugging Face."""

import pytest
import torch
from transformers import LlamaConfig, Starcoder2Config
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.starcoder2.modeling_starcoder2 import Starcoder2MLP

from sglite.interface.errors import UnsupportedModelError
from sglite.layers import GatedMLP, GeluAndMul, PlainMLP, SiluAndMul
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


class TestPlainMLP:
    @pytest.mark.parametrize("bias", [False, True])
    @pytest.mark.parametrize("activation", ["gelu_pytorch_tanh", "silu"])
    def test_is_hugging_faces(self, bias, activation):
        torch.manual_seed(0)
        config = Starcoder2Config(
            hidden_size=64, intermediate_size=70, use_bias=bias, hidden_act=activation
        )
        theirs = Starcoder2MLP(config).eval()
        ours = PlainMLP(64, 70, activation, bias)
        for mine, other in ((ours.c_fc, theirs.c_fc), (ours.c_proj, theirs.c_proj)):
            mine.weight = other.weight
            if bias:
                mine.bias.copy_(other.bias.data)
        x = torch.randn(7, 64)
        torch.testing.assert_close(ours(x), theirs(x).detach(), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_a_row_alone_is_the_same_bits(self, dtype):
        mlp = PlainMLP(24, 37, "gelu_pytorch_tanh")
        mlp.c_fc.weight, mlp.c_proj.weight = torch.randn(37, 24), torch.randn(24, 37)
        mlp.to(dtype)
        x = torch.randn(33, 24).to(dtype)
        whole = mlp(x)
        for row in range(33):
            assert torch.equal(mlp(x[row : row + 1]), whole[row : row + 1])

    def test_unknown_activations_are_refused_by_name(self):
        with pytest.raises(UnsupportedModelError, match="hidden_act='relu' is not implemented"):
            PlainMLP(8, 16, "relu")
