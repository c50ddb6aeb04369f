"""Attention among patches against a naive one; the rotation of rows and columns."""

import math

import pytest
import torch

from sglite.interface.errors import UnsupportedModelError
from sglite.layers.vision import (
    PatchEmbedding,
    Segments,
    VisionAttention,
    VisionMLP,
    grid_rotation,
)


def fill(module, seed=0):
    """Random weights, from -1 to 1."""
    generator = torch.Generator().manual_seed(seed)
    for part in module.modules():
        if hasattr(part, "matrix"):
            part.weight = torch.rand(part.matrix.shape, generator=generator) * 2 - 1
            if part.bias is not None:
                part.bias.copy_(torch.rand(part.bias.shape, generator=generator) * 2 - 1)
    return module


def naive_attention(attention, x, lengths, angles=None):
    width = attention.num_heads * attention.head_dim
    qkv = x @ attention.qkv.weight.T + attention.qkv.bias
    heads = qkv.view(len(x), 3, attention.num_heads, attention.head_dim)
    q, k, v = heads.unbind(1)
    if angles is not None:
        pairs = [(part[..., : angles.shape[1]], part[..., angles.shape[1] :]) for part in (q, k)]
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        q, k = (torch.cat([a * cos - b * sin, b * cos + a * sin], -1) for a, b in pairs)
    outs = []
    begin = 0
    for length in lengths:
        part = slice(begin, begin + length)
        begin += length
        scores = torch.einsum("ihd,jhd->hij", q[part], k[part]) / math.sqrt(attention.head_dim)
        outs.append(torch.einsum("hij,jhd->ihd", scores.softmax(-1), v[part]).reshape(-1, width))
    return torch.cat(outs) @ attention.proj.weight.T + attention.proj.bias


@pytest.mark.parametrize("head_dim", [8, 12, 72, 80])
@pytest.mark.parametrize("lengths", [[1], [37], [16, 16], [5, 130, 1, 32]])
@pytest.mark.parametrize("rotates", [True, False])
def test_attention_is_that_of_each_segment(head_dim, lengths, rotates):
    torch.manual_seed(0)
    attention = fill(VisionAttention(2 * head_dim, 2))
    x = torch.randn(sum(lengths), 2 * head_dim) / head_dim
    angles, cos_sin = None, None
    if rotates:
        angles = torch.randn(len(x), head_dim // 2)
        cos_sin = torch.cat([angles.cos(), angles.sin()], 1)
    segments = Segments(lengths)
    for _ in range(2):  # the memory of keys and values is used again
        actual = attention(x, segments, cos_sin)
        torch.testing.assert_close(
            actual, naive_attention(attention, x, lengths, angles), rtol=1e-4, atol=1e-4
        )


def test_a_segments_bits_do_not_depend_on_the_others():
    torch.manual_seed(0)
    attention = fill(VisionAttention(32, 2))
    x = torch.randn(150, 32)
    together = attention(x, Segments([20, 100, 30]))
    alone = attention(x[20:120].contiguous(), Segments([100]))
    assert torch.equal(together[20:120], alone)


def test_rotation_of_rows_and_columns():
    rows, columns = torch.tensor([0, 3]), torch.tensor([2, 5])
    table = grid_rotation(rows, columns, 8, 100.0)
    frequencies = [1.0, 100.0 ** (-2 / 4)]
    for index, (row, column) in enumerate([(0, 2), (3, 5)]):
        angles = [row * f for f in frequencies] + [column * f for f in frequencies]
        expected = [math.cos(angle) for angle in angles] + [math.sin(angle) for angle in angles]
        torch.testing.assert_close(table[index], torch.tensor(expected))


def test_patches_are_a_convolution():
    torch.manual_seed(0)
    embedding = fill(PatchEmbedding((3, 2, 2), 5, bias=True))
    assert embedding.checkpoint_shape == (5, 3, 2, 2)
    images = torch.randn(2, 3, 6, 4)
    kernel = embedding.weight.view(embedding.checkpoint_shape)
    expected = torch.nn.functional.conv2d(images, kernel, embedding.bias, stride=2)
    patches = images.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).flatten(3)
    torch.testing.assert_close(embedding(patches).permute(0, 3, 1, 2), expected)


@pytest.mark.parametrize("name", ["quick_gelu", "gelu", "gelu_pytorch_tanh", "silu"])
def test_mlp(name):
    from transformers.activations import ACT2FN

    torch.manual_seed(0)
    mlp = fill(VisionMLP(8, 12, name))
    x = torch.randn(7, 8)
    hidden = ACT2FN[name](x @ mlp.fc1.weight.T + mlp.fc1.bias)
    torch.testing.assert_close(mlp(x), hidden @ mlp.fc2.weight.T + mlp.fc2.bias)


def test_an_unknown_activation_is_refused():
    with pytest.raises(UnsupportedModelError, match="'relu'"):
        VisionMLP(8, 12, "relu")
