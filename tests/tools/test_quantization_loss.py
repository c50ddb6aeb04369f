"""The loss of quantising, against Hugging Face with the same rounded weights."""

import math

import pytest
import torch

from sglite.models.checkpoint import resolve_checkpoint
from sglite.tools import quantization_loss as tool
from tests.checkpoints import hugging_face, hugging_face_logits, make_checkpoint
from tests.models.loading import load


@pytest.mark.parametrize("most_logits", [1 << 26, 5 * 384])
def test_perplexity_and_divergence_are_hugging_faces(tmp_path, monkeypatch, most_logits):
    monkeypatch.setattr(tool, "_MOST_LOGITS", most_logits)
    make_checkpoint(tmp_path, "llama")
    texts = [[5, 6, 7, 300, 8], list(range(20, 60))]
    loss = tool.quantization_loss(resolve_checkpoint(tmp_path), "int8", texts)
    plain, rounded = hugging_face(tmp_path), hugging_face(tmp_path)
    quantized = load(tmp_path, quantization="int8").model
    weights = {
        "model.embed_tokens": quantized.model.embed_tokens.weight,
        "lm_head": quantized.lm_head.weight,
    }
    for i, layer in enumerate(quantized.model.layers):
        for part in "qkv":
            name = f"model.layers.{i}.self_attn.{part}_proj"
            weights[name] = layer.self_attn.qkv_proj.segment_weight(part)
        for part in ("gate", "up"):
            name = f"model.layers.{i}.mlp.{part}_proj"
            weights[name] = layer.mlp.gate_up_proj.segment_weight(part)
        weights[f"model.layers.{i}.self_attn.o_proj"] = layer.self_attn.o_proj.weight
        weights[f"model.layers.{i}.mlp.down_proj"] = layer.mlp.down_proj.weight
    for path, weight in weights.items():
        rounded.get_submodule(path).weight.data = weight
    losses, divergences = {plain: [], rounded: []}, []
    for text in texts:
        both = [hugging_face_logits(model, text[:-1]).log_softmax(-1) for model in losses]
        for model, logprobs in zip(losses, both, strict=True):
            losses[model] += (-logprobs.gather(1, torch.tensor(text)[1:, None])).flatten().tolist()
        divergences += (both[0].exp() * (both[0] - both[1])).sum(-1).tolist()
    assert loss.num_tokens == len(divergences) == 43
    for value, model in ((loss.plain_perplexity, plain), (loss.perplexity, rounded)):
        expected = math.exp(sum(losses[model]) / len(losses[model]))
        assert value == pytest.approx(expected, rel=1e-4)
    assert loss.kl == pytest.approx(sum(divergences) / len(divergences), rel=0.01)
    assert loss.largest_kl == pytest.approx(max(divergences), rel=0.01)
    assert 0.5 <= loss.same_best <= 1
    assert "int8: perplexity" in str(loss)


def test_sampled_texts_are_what_the_model_finds_likely(tmp_path):
    make_checkpoint(tmp_path, "qwen3")
    loaded = load(tmp_path)
    texts = tool.sampled_texts(loaded, count=3, length=40)
    assert texts == tool.sampled_texts(loaded, count=3, length=40)
    assert [len(text) for text in texts] == [40, 40, 40]
    checkpoint = resolve_checkpoint(tmp_path)
    likely = tool.quantization_loss(checkpoint, "int8", texts).plain_perplexity
    draws = torch.randint(384, (3, 40), generator=torch.Generator().manual_seed(1)).tolist()
    assert likely < 0.7 * tool.quantization_loss(checkpoint, "int8", draws).plain_perplexity


def test_int4_loses_more_than_int8(tmp_path):
    make_checkpoint(tmp_path, "llama", dtype=torch.bfloat16)
    eight, four = (
        tool.quantization_loss(resolve_checkpoint(tmp_path), method) for method in ("int8", "int4")
    )
    assert 0 < 20 * eight.kl < four.kl
    assert eight.plain_perplexity == four.plain_perplexity
