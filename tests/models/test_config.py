"""What `config.json` says: values that are refused, and how long a context may be."""

import json

import pytest

from sglite import CheckpointError, UnsupportedModelError
from sglite.interface.errors import ConfigError
from tests.checkpoints import edit_json, make_checkpoint
from tests.models.loading import load

_PARTIAL = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5, "factor": 2.0}
_SHORT_LIST = {
    **_PARTIAL,
    "rope_type": "longrope",
    "original_max_position_embeddings": 160,
    "short_factor": [1.0],
    "long_factor": [1.0] * 4,
}


class TestConfig:
    def refused(self, folder, values, error=CheckpointError, match=None):
        edit_json(folder / "config.json", values)
        with pytest.raises(error, match=match) as caught:
            load(folder)
        return str(caught.value)

    def test_unknown_architecture(self, folder):
        known = "'Other'.* Known: .*LlamaForCausalLM"
        self.refused(folder, {"architectures": ["Other"]}, UnsupportedModelError, known)
        with pytest.raises(UnsupportedModelError, match="'Another'"):
            load(folder, architecture="Another")

    @pytest.mark.parametrize("value", [None, [], "LlamaForCausalLM", [3]])
    def test_no_architecture(self, folder, value):
        self.refused(folder, {"architectures": value}, match="pass architecture=")
        assert load(folder, architecture="LlamaForCausalLM")

    def test_unknown_activation(self, folder):
        self.refused(folder, {"hidden_act": "relu2"}, UnsupportedModelError, "hidden_act='relu2'")

    def test_unknown_rope(self, folder):
        values = {"rope_parameters": {"rope_type": "unheard-of", "rope_theta": 1e4}}
        self.refused(folder, values, UnsupportedModelError, "'unheard-of' is not implemented")

    @pytest.mark.parametrize(
        "values",
        [
            {"hidden_size": 0},
            {"hidden_size": -64},
            {"hidden_size": "64"},
            {"hidden_size": 2**40},
            {"vocab_size": -1},
            {"vocab_size": 10**12},
            {"intermediate_size": 0},
            {"num_attention_heads": 0},
            {"num_key_value_heads": 3},
            {"num_key_value_heads": 0},
            {"num_hidden_layers": 10**9},
            {"head_dim": 15},
            {"head_dim": 10**12},
            {"max_position_embeddings": "many"},
            {"max_position_embeddings": 0},
            {"rms_norm_eps": "small"},
            {"tie_word_embeddings": "yes"},
        ],
    )
    def test_values_that_cannot_be(self, folder, values):
        self.refused(folder, values, CheckpointError)

    @pytest.mark.parametrize("value", ["</s>", [1, "</s>"], -1])
    def test_an_end_token_that_is_none(self, folder, value):
        (folder / "generation_config.json").unlink()
        self.refused(folder, {"eos_token_id": value}, match="config.json: eos_token_id")

    @pytest.mark.parametrize(
        ("name", "values", "match"),
        [
            ("gemma2", {"hidden_activation": "relu2"}, "hidden_act='relu2'"),
            ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
            ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
            ("phi3", {"rope_parameters": {**_PARTIAL, "rope_type": "linear"}}, "'linear' is not"),
            ("olmo2", {"rope_parameters": _PARTIAL}, r"partial_rotary_factor=0\.5 is not"),
            ("starcoder2", {"hidden_act": "relu"}, "hidden_act='relu'"),
            *(
                (name, {"layer_types": ["chunked_attention"] * 3}, "'chunked_attention'")
                for name in ("gemma2", "smollm3", "cohere2")
            ),
        ],
    )
    def test_what_a_family_does_not_have(self, name, values, match, tmp_path):
        make_checkpoint(tmp_path, name)
        self.refused(tmp_path, values, UnsupportedModelError, match)

    @pytest.mark.parametrize(
        ("name", "field", "value"),
        [
            ("gemma2", "query_pre_attn_scalar", "many"),
            ("gemma2", "attn_logit_softcapping", "low"),
            ("gemma3", "layer_types", ["sliding_attention"]),
            ("gemma3", "rope_parameters", {"full_attention": {"rope_theta": 5.0}}),
            ("phi3-long", "rope_parameters", _SHORT_LIST),
            ("glm4", "rms_norm_eps", None),
            ("smollm3", "no_rope_layers", [1]),
            ("granite", "residual_multiplier", "half"),
            ("granite", "logits_scaling", 0),
            ("cohere2", "logit_scale", [1.0]),
            ("starcoder2", "norm_epsilon", "small"),
        ],
    )
    def test_values_that_cannot_be_of_other_families(self, name, field, value, tmp_path):
        make_checkpoint(tmp_path, name)
        path = tmp_path / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
        with pytest.raises(CheckpointError):
            load(tmp_path)

    def test_more_layers_than_tensors(self, folder):
        self.refused(
            folder, {"num_hidden_layers": 10**9}, match="num_hidden_layers=1000000000, but"
        )

    def test_no_layers(self, folder):
        self.refused(folder, {"num_hidden_layers": 0}, UnsupportedModelError, "has no RadixAttenti")


class TestContextLength:
    def test_below_the_limit(self, folder):
        loaded = load(folder, context_length=100)
        assert loaded.max_positions == 512
        assert loaded.model.model.layers[0].self_attn.rotary_emb.table.context_length == 100

    def test_above_the_limit(self, folder):
        with pytest.raises(ConfigError, match=r"context_length=513 is not allowed: .* at most 512"):
            load(folder, context_length=513)

    def test_longrope_is_extended_when_asked(self, tmp_path):
        make_checkpoint(tmp_path, "phi3-long")
        assert load(tmp_path).max_positions == 160
        assert load(tmp_path, context_length=512).max_positions == 512
        with pytest.raises(ConfigError, match="at most 512"):
            load(tmp_path, context_length=513)

    def test_scaling_makes_room_when_asked(self, tmp_path):
        rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
        make_checkpoint(tmp_path, rope_parameters=rope)
        assert load(tmp_path).max_positions == 512
        assert load(tmp_path, context_length=1024).max_positions == 1024
        with pytest.raises(ConfigError, match="at most 1024"):
            load(tmp_path, context_length=1025)

    def test_yarn_speaks_of_the_scaled_length(self, tmp_path):
        rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}
        make_checkpoint(tmp_path, rope_parameters=rope)
        assert load(tmp_path).max_positions == 2048
