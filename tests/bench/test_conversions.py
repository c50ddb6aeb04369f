import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from bench.conversions.llama_cpp import interleave_halves, rope_divisors, rope_parameters
from bench.conversions.safetensors import read_tensors, to_float32
from bench.converted import ConversionError, converted_folder, packed_folder
from sglite.models.checkpoint import resolve_checkpoint


def test_tensors_are_read_as_torch_wrote_them(tmp_path):
    written = {
        "a.weight": torch.randn(3, 5).to(torch.bfloat16),
        "b.weight": torch.randn(4, 2).to(torch.float16),
        "c.weight": torch.randn(7),
    }
    first = {name: written[name] for name in ("a.weight", "b.weight")}
    save_file(first, tmp_path / "model-00001-of-00002.safetensors", metadata={"format": "pt"})
    save_file({"c.weight": written["c.weight"]}, tmp_path / "model-00002-of-00002.safetensors")
    read = dict(read_tensors(tmp_path))
    assert list(read) == list(written)
    for name, tensor in written.items():
        np.testing.assert_array_equal(to_float32(read[name]), tensor.float().numpy())
    assert read["a.weight"].dtype == np.uint16


def test_a_tensor_of_another_dtype_is_named(tmp_path):
    save_file({"ids": torch.arange(3)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="ids is I64"):
        list(read_tensors(tmp_path))


def test_halves_are_interleaved_head_by_head():
    weight = np.arange(2 * 6 * 3).reshape(12, 3)  # two heads of six
    interleaved = interleave_halves(weight, 2)
    for head in range(2):
        for index in range(3):
            np.testing.assert_array_equal(
                interleaved[6 * head + 2 * index], weight[6 * head + index]
            )
            np.testing.assert_array_equal(
                interleaved[6 * head + 2 * index + 1], weight[6 * head + index + 3]
            )


def test_llama3_frequencies_are_those_of_hugging_face():
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = LlamaConfig(
        hidden_size=256, num_attention_heads=4, head_dim=64, rope_parameters=dict(rope)
    )
    wanted, _ = ROPE_INIT_FUNCTIONS["llama3"](config, device="cpu")
    plain = 500000.0 ** (-np.arange(0, 64, 2) / 64)
    np.testing.assert_allclose(plain / rope_divisors(rope, 64), wanted.numpy(), rtol=1e-5)


def test_rope_parameters_of_older_checkpoints():
    assert rope_parameters({"rope_theta": 1e6}) == {"rope_theta": 1e6, "rope_type": "default"}
    scaled = rope_parameters({"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3"}})
    assert scaled == {"rope_theta": 5e5, "rope_type": "llama3"}
    assert rope_divisors(rope_parameters({}), 64) is None
    with pytest.raises(ValueError, match="'yarn' is not converted"):
        rope_divisors({"rope_type": "yarn"}, 64)


def test_a_failed_conversion_says_why_and_leaves_nothing(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    with pytest.raises(ConversionError, match=r"llama_cpp does not convert model:[\s\S]*Error"):
        converted_folder(
            "llama_cpp",
            sys.executable,
            folder,
            dtype="bfloat16",
            quantization="int8",
            cache_folder=tmp_path / "cache",
        )
    assert not list(tmp_path.glob("cache/*int8*"))


def test_an_engine_that_reads_safetensors_gets_the_checkpoint_itself(tmp_path):
    for engine in ("sglite", "transformers", "vllm_cpu"):
        folder = converted_folder(
            engine,
            sys.executable,
            tmp_path,
            dtype="bfloat16",
            quantization=None,
            cache_folder=tmp_path,
        )
        assert folder == tmp_path


def test_our_own_packed_checkpoint_is_made_once(tmp_path):
    demo = resolve_checkpoint("demo").folder
    made = packed_folder(demo, "bfloat16", "int8", tmp_path)
    time_made = (made / "packed.safetensors").stat().st_mtime_ns
    assert packed_folder(demo, "bfloat16", "int8", tmp_path) == made
    assert (made / "packed.safetensors").stat().st_mtime_ns == time_made
