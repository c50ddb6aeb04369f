"""Linear, stacked linear, embedding and head: what they compute, and their weights' contract."""

import copy

import pytest
import torch
from torch import nn

from sglite.interface.errors import UnsupportedModelError
from sglite.layers import Embedding, GateUpLinear, Linear, LMHead, QKVLinear, QuantizationConfig
from tests.ops.closeness import DTYPES


def filled(layer, dtype=torch.float32, seed=0):
    """The layer with random weights in a dtype, and those weights."""
    torch.manual_seed(seed)
    weight = torch.randn(layer.matrix.shape).to(dtype)
    layer.to(dtype)
    layer.matrix.write_rows(0, weight)
    if getattr(layer, "bias", None) is not None:
        layer.bias.data.normal_()
    return layer, weight


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_linear_is_torchs(dtype, bias):
    layer, weight = filled(Linear(50, 37, bias=bias), dtype)
    x = torch.randn(5, 50).to(dtype)
    wide_bias = None if layer.bias is None else layer.bias.float()
    expected = nn.functional.linear(x.float(), weight.float(), wide_bias)
    torch.testing.assert_close(layer(x), expected.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_residual_is_the_same_bits_as_an_addition(dtype):
    layer, _ = filled(Linear(50, 37), dtype)
    x, residual = torch.randn(9, 50).to(dtype), torch.randn(9, 37).to(dtype)
    before = residual.clone()
    assert torch.equal(layer(x, residual=residual), residual + layer(x))
    assert torch.equal(residual, before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_weight_reads_back_as_it_was_written(dtype):
    layer, weight = filled(Linear(50, 37), dtype)
    assert layer.weight.dtype == dtype
    assert torch.equal(layer.weight, weight)
    for value in (weight * 2, nn.Parameter(weight * 3)):
        layer.weight = value
        assert torch.equal(layer.weight, value)
    assert "weight" not in dict(layer.named_parameters())
    with pytest.raises(ValueError, match=r"weight: expected shape \[37, 50\], got \[50, 37\]"):
        layer.weight = weight.T


def test_module_to_converts_the_packed_weight():
    layer, weight = filled(Linear(50, 37))
    model = nn.Sequential(layer).to(torch.bfloat16)
    assert torch.equal(model[0].weight, weight.bfloat16())
    assert model[0].bias.dtype == torch.bfloat16
    assert torch.equal(model.float()[0].weight, weight.bfloat16().float())


def test_conversion_on_writing_is_torchs_also_for_large_tensors():
    layer = Linear(4096, 1100, bias=False).to(torch.bfloat16)  # more than is converted at once
    weight = torch.randn(1100, 4096)
    layer.matrix.write_rows(0, weight)
    assert torch.equal(layer.weight, weight.bfloat16())


def test_a_copy_is_independent():
    layer, weight = filled(Linear(50, 37))
    other = copy.deepcopy(layer)
    layer.weight = weight + 1
    assert torch.equal(other.weight, weight)


def test_use_before_loading_names_the_layer():
    layer = Linear(50, 37, prefix="model.layers.0.mlp.down_proj")
    with pytest.raises(RuntimeError, match=r"0.mlp.down_proj \[37, 50\] is used before"):
        layer(torch.randn(1, 50))


def test_quantization_is_refused_by_name():
    for make in (
        lambda: Linear(8, 8, quant_config=QuantizationConfig()),
        lambda: QKVLinear(8, 4, 2, quant_config=QuantizationConfig()),
        lambda: Embedding(8, 8, quant_config=QuantizationConfig()),
    ):
        with pytest.raises(UnsupportedModelError, match="quant_config"):
            make()


def test_qkv_and_gate_up_by_segments():
    qkv, weight = filled(QKVLinear(64, 16, 6, 2))
    assert qkv.segments == {"q": (0, 96), "k": (96, 128), "v": (128, 160)}
    assert torch.equal(qkv.segment_weight("k"), weight[96:128])
    assert torch.equal(qkv.segment_bias("v"), qkv.bias[128:])
    x = torch.randn(3, 64)
    key = nn.functional.linear(x, qkv.segment_weight("k"), qkv.segment_bias("k"))
    torch.testing.assert_close(qkv(x)[:, 96:128], key)
    gate_up, weight = filled(GateUpLinear(64, 40, bias=False))
    assert torch.equal(gate_up.segment_weight("up"), weight[40:])
    assert gate_up.segment_bias("up") is None


def test_heads_must_divide():
    with pytest.raises(ValueError, match="6 query heads cannot share 4 key/value heads"):
        QKVLinear(64, 16, 6, 4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_embedding_and_tied_head_share_one_table(dtype):
    embedding = Embedding(70, 24)
    head = LMHead(70, 24)
    head.tie_weights(embedding)
    _, table = filled(embedding, dtype)
    ids = torch.tensor([0, 69, 3, 3])
    assert torch.equal(embedding(ids), table[ids])
    assert torch.equal(embedding.weight, table)
    x = torch.randn(2, 24).to(dtype)
    logits = head(x)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, x.float() @ table.float().T)
    assert head.matrix is embedding.matrix
    with pytest.raises(IndexError):
        embedding(torch.tensor([70]))


def test_tying_checks_the_shape():
    with pytest.raises(ValueError, match=r"expected an embedding \[70, 24\], got \[71, 24\]"):
        LMHead(70, 24).tie_weights(Embedding(71, 24))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_embeddings_scale_is_rounded_first_and_not_seen_by_a_tied_head(dtype):
    scale = 3072**0.5  # 55.4256, in bfloat16 55.5
    embedding, head = Embedding(70, 24, scale=scale), LMHead(70, 24)
    head.tie_weights(embedding)
    torch.nn.ModuleList([embedding, head]).to(dtype)
    weight = torch.randn(70, 24).to(dtype)
    embedding.weight = weight
    ids = torch.tensor([3, 69, 3])
    assert torch.equal(embedding(ids), weight[ids] * torch.tensor(scale, dtype=dtype))
    assert torch.equal(embedding.weight, weight)
    x = torch.randn(2, 24).to(dtype)
    torch.testing.assert_close(head(x), x.float() @ weight.float().T)
