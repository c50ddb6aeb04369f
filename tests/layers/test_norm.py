"""RMSNorm as a module."""

import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from sglite.layers import RMSNorm


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
