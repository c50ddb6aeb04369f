"""Loading: what arrives in the model, and what is said where files and model do not fit."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from sglite import CheckpointError, OutOfMemoryError, UnsupportedModelError, register
from sglite.layers import Linear, RadixAttention
from sglite.models.checkpoint import resolve_checkpoint
from sglite.models.llama import LlamaForCausalLM
from sglite.models.loader import kv_layers_of
from tests.checkpoints import CONFIGS, edit_json, make_checkpoint
from tests.models.loading import load, logits_of, move_data_to_odd_places


class TestWhatArrives:
    def test_every_weight_reads_back(self, folder):
        tensors = load_file(folder / "model.safetensors")
        model = load(folder).model
        layer = model.model.layers[1]
        for name in ("q", "k", "v"):
            expected = tensors[f"model.layers.1.self_attn.{name}_proj.weight"]
            assert torch.equal(layer.self_attn.qkv_proj.segment_weight(name), expected)
        for name in ("gate", "up"):
            expected = tensors[f"model.layers.1.mlp.{name}_proj.weight"]
            assert torch.equal(layer.mlp.gate_up_proj.segment_weight(name), expected)
        for path in ("self_attn.o_proj", "mlp.down_proj", "input_layernorm"):
            actual = layer.get_submodule(path).weight
            assert torch.equal(actual, tensors[f"model.layers.1.{path}.weight"])
        assert torch.equal(model.lm_head.weight, tensors["lm_head.weight"])
        assert torch.equal(model.model.embed_tokens.weight, tensors["model.embed_tokens.weight"])

    def test_biases(self, tmp_path):
        make_checkpoint(tmp_path, "qwen2")
        tensors = load_file(tmp_path / "model.safetensors")
        attention = load(tmp_path).model.model.layers[0].self_attn
        for name in ("q", "k", "v"):
            expected = tensors[f"model.layers.0.self_attn.{name}_proj.bias"]
            assert torch.equal(attention.qkv_proj.segment_bias(name), expected)
        assert attention.o_proj.bias is None

    def test_what_the_engine_learns(self, folder):
        edit_json(folder / "generation_config.json", {"eos_token_id": [1, 7], "temperature": 0.6})
        loaded = load(folder)
        assert loaded.architecture == "LlamaForCausalLM"
        assert (loaded.vocab_size, loaded.max_positions) == (384, 512)
        assert [(layer.num_kv_heads, layer.head_dim) for layer in loaded.kv_layers] == [(2, 16)] * 3
        assert loaded.end_token_ids == (1, 7)
        assert loaded.generation_defaults.temperature == 0.6
        assert not loaded.model.training
        assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
        (folder / "generation_config.json").unlink()
        assert load(folder).end_token_ids == (1,)

    def test_shards_give_the_same_bits(self, folder, tmp_path):
        sharded = make_checkpoint(tmp_path / "sharded", shard_size="50KB")
        assert len(resolve_checkpoint(sharded).weight_files) > 3
        assert torch.equal(logits_of(load(sharded)), logits_of(load(folder)))

    def test_a_tied_head_is_stored_once(self, tmp_path):
        loaded = load(make_checkpoint(tmp_path, "llama-tied"))
        assert loaded.model.lm_head.matrix is loaded.model.model.embed_tokens.matrix

    def test_a_tied_checkpoint_may_hold_the_head_as_well(self, tmp_path):
        make_checkpoint(tmp_path, "llama-tied")
        expected = logits_of(load(tmp_path))
        tensors = load_file(tmp_path / "model.safetensors")
        table = tensors["model.embed_tokens.weight"]
        save_file({**tensors, "lm_head.weight": table.clone()}, tmp_path / "model.safetensors")
        assert torch.equal(logits_of(load(tmp_path)), expected)
        save_file({**tensors, "lm_head.weight": table + 1}, tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError, match=r"'(lm_head|model.embed_tokens).weight' is tied"):
            load(tmp_path)
        del tensors["model.embed_tokens.weight"]
        save_file({**tensors, "lm_head.weight": table}, tmp_path / "model.safetensors")
        assert torch.equal(logits_of(load(tmp_path)), expected)

    def test_harmless_buffers_of_old_checkpoints(self, folder):
        tensors = load_file(folder / "model.safetensors")
        expected = logits_of(load(folder))
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
        save_file(tensors, folder / "model.safetensors")
        assert torch.equal(logits_of(load(folder)), expected)

    def test_old_config_spellings(self, folder):
        expected = logits_of(load(folder))
        rope = json.loads((folder / "config.json").read_text())["rope_parameters"]
        theta = rope.pop("rope_theta")
        rope["type"] = rope.pop("rope_type")
        edit_json(
            folder / "config.json",
            {
                "rope_parameters": None,
                "rope_scaling": rope,
                "rope_theta": theta,
                "dtype": None,
                "torch_dtype": "float32",
            },
        )
        assert torch.equal(logits_of(load(folder)), expected)

    @pytest.mark.parametrize("name", CONFIGS)
    def test_in_every_dtype(self, name, tmp_path):
        make_checkpoint(tmp_path, name, dtype=torch.bfloat16)
        for dtype in ("float32", "bfloat16", "float16"):
            loaded = load(tmp_path, dtype=dtype)
            assert loaded.dtype == getattr(torch, dtype)
            assert all(p.dtype == loaded.dtype for p in loaded.model.parameters())
            assert torch.isfinite(logits_of(loaded)).all()


class TestDtype:
    def test_auto_is_the_checkpoints(self, tmp_path):
        make_checkpoint(tmp_path, dtype=torch.bfloat16)
        assert load(tmp_path).dtype == torch.bfloat16
        edit_json(tmp_path / "config.json", {"dtype": None})
        assert load(tmp_path).dtype == torch.bfloat16  # that of the tensors
        edit_json(tmp_path / "config.json", {"torch_dtype": "float16"})
        assert load(tmp_path).dtype == torch.float16

    def test_conversion_is_torchs(self, folder):
        loaded = load(folder, dtype=torch.bfloat16)
        tensors = load_file(folder / "model.safetensors")
        assert torch.equal(loaded.model.lm_head.weight, tensors["lm_head.weight"].bfloat16())

    def test_float64_runs_in_float32(self, folder):
        tensors = load_file(folder / "model.safetensors")
        doubles = {name: t.double() for name, t in tensors.items()}
        save_file(doubles, folder / "model.safetensors")
        edit_json(folder / "config.json", {"dtype": "float64"})
        assert load(folder).dtype == torch.float32

    def test_what_float16_cannot_hold(self, folder):
        tensors = load_file(folder / "model.safetensors")
        tensors["model.norm.weight"][3] = 1e5
        save_file(tensors, folder / "model.safetensors")
        with pytest.raises(CheckpointError, match=r"'model.norm.weight' has a value of 1e\+05"):
            load(folder, dtype="float16")

    def test_others_are_refused(self, folder):
        edit_json(folder / "config.json", {"dtype": "float8_e4m3fn"})
        with pytest.raises(UnsupportedModelError, match="dtype 'float8_e4m3fn' is not implemented"):
            load(folder)

    def test_a_models_own_buffers_keep_theirs(self, folder, architecture):
        @register(architecture)
        class Model(LlamaForCausalLM):
            def __init__(self, config):
                super().__init__(config)
                self.register_buffer("angles", torch.ones(3), persistent=False)

        loaded = load(folder, architecture=architecture, dtype="bfloat16")
        assert loaded.model.angles.dtype == torch.float32


class TestFit:
    """Strict: no tensor missing, left over or misshapen."""

    @pytest.fixture
    def tensors(self, folder):
        return load_file(folder / "model.safetensors")

    def refused(self, folder, tensors, *parts):
        save_file(tensors, folder / "model.safetensors")
        with pytest.raises(CheckpointError) as caught:
            load(folder)
        for part in (*parts, str(folder)):
            assert part in str(caught.value)
        return str(caught.value)

    def test_missing(self, folder, tensors):
        del tensors["model.layers.2.self_attn.k_proj.weight"]
        del tensors["model.norm.weight"]
        self.refused(
            folder,
            tensors,
            "missing: ",
            "model.layers.2.self_attn.k_proj.weight",
            "model.norm.weight",
        )

    def test_left_over(self, folder, tensors):
        tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(64)
        self.refused(
            folder,
            tensors,
            "not used by the model: model.layers.0.self_attn.q_proj.bias in model.safetensors",
        )

    def test_misshapen(self, folder, tensors):
        tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(64, 160)
        self.refused(
            folder,
            tensors,
            "model.layers.0.mlp.up_proj.weight [64, 160], expected [160, 64], in model.safetensors",
        )

    @pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.int64])
    def test_no_float(self, folder, tensors, dtype):
        name = "model.layers.0.mlp.up_proj.weight"
        tensors[name] = tensors[name].to(dtype)
        self.refused(folder, tensors, f"{name} of ", "expected F32, BF16, F16 or F64")

    def test_all_at_once_and_long_lists_are_cut(self, folder, tensors):
        for name in list(tensors):
            if "layers.1" in name:
                tensors[name.replace("layers.1", "layers.8")] = tensors.pop(name)
        message = self.refused(folder, tensors, "missing", "not used", "and 4 more")
        assert len(message) < 1500

    def test_in_two_files(self, folder, tensors):
        half = {"model.norm.weight": tensors["model.norm.weight"]}
        (folder / "model.safetensors").unlink()
        save_file(tensors, folder / "a.safetensors")
        save_file(half, folder / "b.safetensors")
        with pytest.raises(CheckpointError, match=r"'model.norm.weight' is in two files: .*a.saf"):
            load(folder)

    def test_truncated(self, folder):
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(CheckpointError, match=f"{path} is cut short"):
            load(folder)

    def test_nothing_is_read_before_the_headers_fit(self, folder, tensors, monkeypatch):
        from sglite.models.safetensors_file import SafetensorsFile

        def read(self, entry):
            raise AssertionError("a tensor was read")

        monkeypatch.setattr(SafetensorsFile, "read", read)
        del tensors["model.norm.weight"]
        self.refused(folder, tensors, "missing")


class TestOwnClasses:
    def test_a_subclass_by_argument_and_by_config(self, folder, architecture):
        @register(architecture)
        class Shifted(LlamaForCausalLM):
            def forward(self, input_ids, positions, forward_batch, input_embeds=None):
                out = super().forward(input_ids, positions, forward_batch, input_embeds)
                out.next_token_logits = out.next_token_logits + 1
                return out

        expected = logits_of(load(folder)) + 1
        loaded = load(folder, architecture=architecture)
        assert (loaded.architecture, type(loaded.model)) == (architecture, Shifted)
        assert torch.equal(logits_of(loaded), expected)
        edit_json(folder / "config.json", {"architectures": [architecture]})
        assert torch.equal(logits_of(load(folder)), expected)

    @pytest.mark.parametrize("name", CONFIGS)
    def test_config_classes_add_nothing_where_the_file_says_everything(
        self, name, tmp_path, architecture
    ):
        """A class without `config_fields` of its own always gets the family's config class."""
        loaded = load(make_checkpoint(tmp_path, name))
        register(architecture)(type("Model", (type(loaded.model),), {}))
        by_class = load(tmp_path, architecture=architecture)
        assert type(loaded.config) is transformers.PreTrainedConfig
        assert type(by_class.config).__name__ == CONFIGS[name][0]
        assert torch.equal(logits_of(by_class), logits_of(loaded))

    def test_a_model_type_that_transformers_does_not_know(self, folder, architecture):
        register(architecture)(LlamaForCausalLM)
        expected = logits_of(load(folder))
        edit_json(
            folder / "config.json", {"model_type": "unheard-of", "architectures": [architecture]}
        )
        assert torch.equal(logits_of(load(folder)), expected)

    def test_a_constructor_that_fails_is_named_with_its_cause(self, folder, architecture):
        @register(architecture)
        class Model(nn.Module):
            def __init__(self, config):
                super().__init__()
                self.size = config.no_such_field

        with pytest.raises(CheckpointError, match=r"cannot be built.*no_such_field") as e:
            load(folder, architecture=architecture)
        assert isinstance(e.value.__cause__, AttributeError)

    def test_plain_torch_parts_and_a_shared_module(self, tmp_path, architecture):
        """nn.Linear, a parameter of its own, and the embedding used as the head."""

        @register(architecture)
        class Model(LlamaForCausalLM):
            def __init__(self, config):
                super().__init__(config)
                self.lm_head = self.model.embed_tokens
                self.model.layers[0].mlp.down_proj = nn.Linear(
                    config.intermediate_size, config.hidden_size, bias=False
                )
                self.bias = nn.Parameter(torch.zeros(config.vocab_size))

            def forward(self, *arguments):
                out = super().forward(*arguments)
                out.next_token_logits += self.bias
                return out

        make_checkpoint(tmp_path, "llama-tied")
        expected = logits_of(load(tmp_path))
        with pytest.raises(CheckpointError, match="missing: bias"):
            load(tmp_path, architecture=architecture)
        tensors = load_file(tmp_path / "model.safetensors")
        bias = torch.randn(384)
        save_file({**tensors, "bias": bias}, tmp_path / "model.safetensors")
        loaded = load(tmp_path, architecture=architecture)
        assert set(tensors) | {"bias"} >= set(dict(loaded.model.named_parameters()))
        torch.testing.assert_close(logits_of(loaded), expected + bias, rtol=1e-4, atol=1e-4)

    def test_fused_tensors_need_no_table(self, folder, architecture):
        @register(architecture)
        class Fused(LlamaForCausalLM):
            stacked_params = {"gate_up_proj": ("gate_proj", "up_proj")}  # noqa: RUF012

        expected = logits_of(load(folder))
        tensors = load_file(folder / "model.safetensors")
        for i in range(3):
            parent = f"model.layers.{i}.self_attn"
            parts = [tensors.pop(f"{parent}.{name}_proj.weight") for name in ("q", "k", "v")]
            tensors[f"{parent}.qkv_proj.weight"] = torch.cat(parts)
        save_file(tensors, folder / "model.safetensors")
        assert torch.equal(logits_of(load(folder, architecture=architecture)), expected)


class TestKVLayers:
    def attention(self, layer_id, kv_heads=2, head_dim=16):
        return RadixAttention(4, head_dim, 1.0, kv_heads, layer_id)

    def test_by_layer_id(self):
        layers = kv_layers_of(nn.ModuleList([self.attention(1, 1, 8), self.attention(0, 2, 16)]))
        assert [(layer.num_kv_heads, layer.head_dim) for layer in layers] == [(2, 16), (1, 8)]

    def test_ids_that_do_not_count_up(self):
        with pytest.raises(UnsupportedModelError, match="0 and 1 both have layer_id 0"):
            kv_layers_of(nn.ModuleList([self.attention(0), self.attention(0)]))
        with pytest.raises(UnsupportedModelError, match=r"are \[0, 2\]; they must be 0 to 1"):
            kv_layers_of(nn.ModuleList([self.attention(0), self.attention(2)]))
        with pytest.raises(UnsupportedModelError, match="has no RadixAttention"):
            kv_layers_of(nn.ModuleList([Linear(2, 2)]))


def test_weights_without_room_are_refused_before_they_are_read(folder):
    with pytest.raises(OutOfMemoryError, match="the weights need .* GB on cpu, where 0.00 GB"):
        load(folder, room=1000)


def test_data_at_odd_places_gives_the_same_bits(folder):
    """Such tensors are copied out of the file, whose pages may not be given back piece by piece."""
    expected = load(folder).model.state_dict()
    logits = logits_of(load(folder))
    move_data_to_odd_places(folder / "model.safetensors")
    odd = load(folder)
    assert torch.equal(logits_of(odd), logits)
    for name, tensor in odd.model.state_dict().items():
        assert torch.equal(tensor, expected[name])
