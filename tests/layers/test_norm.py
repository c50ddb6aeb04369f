"""Norms as modules."""

import pytest
import torch
from transformers.models.cohere2.modeling_cohere2 import Cohere2LayerNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from sglite.layers import LayerNorm, RMSNorm


def pair(width=48, eps=1e-5):
    torch.manual_seed(0)
    ours, theirs = RMSNorm(width, eps), LlamaRMSNorm(width, eps)
    weight = torch.randn(width)
    ours.weight.data.copy_(weight)
    theirs.weight.data.copy_(weight)
    return ours, theirs


def test_is_hugging_faces():
    ours, theirs = pair()
    x = torch.randn(2, 5, 48)
    torch.testing.assert_close(ours(x), theirs(x).detach())


def test_with_a_residual_it_gives_the_sum_too():
    ours, theirs = pair()
    x, residual = torch.randn(5, 48), torch.randn(5, 48)
    total = x + residual
    normed, new_residual = ours(x, residual)
    assert new_residual is residual
    assert torch.equal(residual, total)
    torch.testing.assert_close(normed, theirs(total).detach())


def test_weight_offset():
    x = torch.randn(3, 16)
    offset, plain = RMSNorm(16, weight_offset=1.0), RMSNorm(16)
    offset.weight.data.zero_()
    torch.testing.assert_close(offset(x), plain(x))


def test_the_weight_takes_no_gradient():
    assert not RMSNorm(4).weight.requires_grad


class TestLayerNorm:
    def pair(self, bias, dtype=torch.float32, width=50):
        torch.manual_seed(0)
        ours, theirs = LayerNorm(width, 0.1, bias=bias), torch.nn.LayerNorm(width, 0.1, bias=bias)
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            other.data.normal_()
            mine.data = other.data.to(dtype)
        return ours, theirs

    @pytest.mark.parametrize("bias", [False, True])
    def test_is_torchs(self, bias):
        ours, theirs = self.pair(bias)
        assert set(ours.state_dict()) == set(theirs.state_dict())
        x = torch.randn(2, 5, 50)
        torch.testing.assert_close(ours(x), theirs(x).detach())

    def test_without_a_bias_it_is_coheres_to_the_bit_where_it_is_rounded(self):
        ours, _ = self.pair(bias=False, dtype=torch.bfloat16)
        theirs = Cohere2LayerNorm(50, 0.1).to(torch.bfloat16)
        theirs.weight.data = ours.weight.data
        x = torch.randn(40, 50).bfloat16()
        different = ours(x) != theirs(x).detach()
        assert different.float().mean() < 0.01  # sums in another order, next to a border

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_a_row_alone_is_the_same_bits(self, dtype):
        ours, _ = self.pair(bias=True, dtype=dtype)
        x = torch.randn(40, 50).to(dtype)
        whole = ours(x)
        for row in range(40):
            assert torch.equal(ours(x[row : row + 1].clone()), whole[row : row + 1])

    def test_the_weights_take_no_gradient(self):
        assert not any(parameter.requires_grad for parameter in LayerNorm(4).parameters())
