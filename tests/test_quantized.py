"""`LLM(quantization=)`: every native family runs, near to its plain self, with the same bits."""

import random
import re

import pytest
import torch

from sglite import LLM
from sglite.layers import Router
from sglite.models.quantization import layout_at_load
from sglite.ops import PackedWeight, QuantizedWeight
from tests.checkpoints import CONFIGS, VOCAB_SIZE, make_checkpoint
from tests.forward import Runner
from tests.models.loading import load, logits_of


def prompts(lengths=(1, 9, 40, 90)):
    draw = random.Random(0)
    return [[draw.randrange(2, VOCAB_SIZE) for _ in range(length)] for length in lengths]


@pytest.mark.parametrize("method", ["int8", "int4"])
@pytest.mark.parametrize("family", CONFIGS)
def test_logits_are_those_of_the_rounded_weights(tmp_path, family, method):
    """The same model in float32 with the weights as they read back; routers are not rounded."""
    make_checkpoint(tmp_path, family)
    quantized, plain = load(tmp_path, quantization=method), load(tmp_path)
    assert quantized.quantization == method
    matrices = {}
    for (path, module), (_, other) in zip(
        quantized.model.named_modules(), plain.model.named_modules(), strict=True
    ):
        if not hasattr(module, "matrix"):
            continue
        if isinstance(module, Router):
            assert type(module.matrix.stored) is PackedWeight, path
            assert torch.equal(module.weight, other.weight), path
            continue
        assert type(module.matrix.stored) is QuantizedWeight, path
        matrices[path] = module.matrix
        weight = module.weight
        step = other.weight.abs().amax() / (127 if method == "int8" else 8)
        # A step, and with int4 eight times the rounding of its scale to bfloat16.
        assert (weight - other.weight).abs().max() <= (1.01 if method == "int8" else 1.04) * step
        is_vocabulary = path in ("model.embed_tokens", "lm_head")
        assert module.matrix.layout.bits == (4 if method == "int4" and not is_vocabulary else 8)
        other.weight = weight
    assert {"model.embed_tokens", "lm_head"} <= matrices.keys()
    assert any(re.match(r"model\.layers\.2\..*(down|c)_proj", path) for path in matrices)
    actual, expected = logits_of(quantized, range(5, 60)), logits_of(plain, range(5, 60))
    assert (actual - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_a_tied_head_reads_the_same_codes(tmp_path):
    make_checkpoint(tmp_path, "llama-tied")
    model = load(tmp_path, quantization="int8").model
    assert model.lm_head.matrix is model.model.embed_tokens.matrix


@pytest.mark.parametrize(
    ("columns", "expected"), [(256, 128), (576, 64), (96, 32), (150, 32), (24, 32)]
)
def test_int4_groups_divide_the_columns_where_they_can(columns, expected):
    from sglite.layers.weight import Weight

    assert layout_at_load(Weight(8, columns, ""), "int4").group_size == expected


@pytest.mark.parametrize("method", ["int8", "int4"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_generates_the_same_whatever_shares_the_batch(tmp_path, family, method):
    make_checkpoint(tmp_path, family, dtype=torch.bfloat16)
    parameters = {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True, "logprobs": 1}

    def run(llm, order):
        outputs = llm.generate([prompts()[index] for index in order], parameters)
        return {
            index: [
                (token, entry[token].logprob)
                for token, entry in zip(output.token_ids, output.logprobs, strict=True)
            ]
            for index, output in zip(order, outputs, strict=True)
        }

    with LLM(tmp_path, quantization=method, kv_cache_tokens=2048, prefix_cache=False) as llm:
        assert llm.config.quantization == method
        assert llm.config.dtype == "bfloat16"
        alone = {}
        for index in range(len(prompts())):
            alone |= run(llm, [index])
        assert run(llm, [3, 1, 0, 2]) == alone
    with LLM(tmp_path, quantization=method, kv_cache_tokens=2048, chunked_prefill_size=13) as llm:
        assert run(llm, [0, 1, 2, 3]) == alone
        assert run(llm, [2, 3, 0, 1]) == alone  # out of the cache


def test_rows_keep_their_bits_in_a_model(tmp_path):
    make_checkpoint(tmp_path, "qwen3", dtype=torch.float16)
    loaded = load(tmp_path, quantization="int4")
    together = Runner(loaded.model, loaded.kv_layers, loaded.dtype, num_sequences=4).run(prompts())
    for token_ids, logits in zip(prompts(), together, strict=True):
        run = Runner(loaded.model, loaded.kv_layers, loaded.dtype, num_sequences=1)
        assert torch.equal(run.run([token_ids])[0], logits)


def test_a_weight_that_is_assigned_is_quantised(tmp_path):
    make_checkpoint(tmp_path, "llama")
    layer = load(tmp_path, quantization="int8").model.model.layers[0].mlp.down_proj
    before = layer.weight
    layer.weight = 2 * before
    torch.testing.assert_close(layer.weight, 2 * before)
    assert type(layer.matrix.stored) is QuantizedWeight
    assert layer.to(torch.bfloat16).weight.dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"mlp.down_proj: quantised weights stay on the CPU"):
        layer.to("meta")


def test_a_matrix_says_how_much_it_takes(tmp_path):
    """Codes and scales are all that is left."""
    make_checkpoint(tmp_path, "llama", dtype=torch.bfloat16)
    for method in ("int8", "int4"):
        for module in load(tmp_path, quantization=method).model.modules():
            matrix = getattr(module, "matrix", None)
            if matrix is None:
                continue
            rows, columns = matrix.shape
            padded = -(-rows // 32) * 32 / rows
            assert matrix.stored.nbytes <= padded * matrix.nbytes
            assert matrix.nbytes <= rows * columns * matrix.layout.bits / 8 * 1.15
