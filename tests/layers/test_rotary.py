"""Rotary embedding: every kind against Hugging Face, growth of the tables, refusals."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from sglite.interface.errors import CheckpointError, UnsupportedModelError
from sglite.layers.rope_frequencies import KINDS, RopeParameters, inverse_frequencies
from sglite.layers.rotary import get_rope, rope_from_config, set_context_length

MAX_POSITION = 256
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
SCALINGS = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "llama3": LLAMA3,
    "longrope": {
        "rope_type": "longrope",
        "original_max_position_embeddings": 64,
        "short_factor": [1.0 + 0.01 * i for i in range(32)],
        "long_factor": [1.0 + 0.5 * i for i in range(32)],
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "yarn-attention-factor": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 0.7},
    "yarn-betas": {"rope_type": "yarn", "factor": 3.0, "beta_fast": 16, "beta_slow": 2},
    "yarn-mscale": {"rope_type": "yarn", "factor": 40.0, "mscale": 0.8, "mscale_all_dim": 0.5},
    "yarn-no-truncation": {"rope_type": "yarn", "factor": 4.0, "truncate": False},
}


def hf_config(scaling, **values):
    parameters = {"rope_theta": 500000.0, **scaling}
    return LlamaConfig(
        hidden_size=128,
        num_attention_heads=2,
        max_position_embeddings=MAX_POSITION,
        rope_parameters=parameters,
        **values,
    )


def test_every_kind_is_tested():
    assert {scaling["rope_type"] for scaling in SCALINGS.values()} == set(KINDS)


@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_are_hugging_faces(name):
    config = hf_config(SCALINGS[name])
    parameters = RopeParameters.read(config.rope_parameters)
    ours, factor = inverse_frequencies(parameters, 64, MAX_POSITION, MAX_POSITION)
    compute = ROPE_INIT_FUNCTIONS.get(
        parameters.kind, LlamaRotaryEmbedding.compute_default_rope_parameters
    )
    theirs, their_factor = compute(config, seq_len=MAX_POSITION)
    assert factor == pytest.approx(their_factor, rel=1e-12)
    # To the last bit but one: the angle of a late position multiplies what is left.
    torch.testing.assert_close(ours, theirs, rtol=2.5e-7, atol=0)


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotation_is_hugging_faces(name, dtype):
    config = hf_config(SCALINGS[name])
    rope = rope_from_config(config, 64)
    torch.manual_seed(0)
    q, k = torch.randn(MAX_POSITION, 4, 64), torch.randn(MAX_POSITION, 2, 64)
    positions = torch.randperm(MAX_POSITION)
    cos, sin = LlamaRotaryEmbedding(config)(q[None], positions[None])
    expected = apply_rotary_pos_emb(q[None], k[None], cos, sin, unsqueeze_dim=2)
    q, k = q.to(dtype), k.to(dtype)
    rotated = rope(positions, q, k)
    assert rotated == (q, k)  # in place
    tolerance = 1e-4 if dtype == torch.float32 else 0.03
    for actual, wanted in zip(rotated, expected, strict=True):
        torch.testing.assert_close(actual.float(), wanted[0], rtol=0, atol=tolerance)


def test_heads_may_lie_flat_in_one_tensor():
    rope = get_rope(32, 32, 128)
    torch.manual_seed(0)
    qkv = torch.randn(5, 6 * 32)
    q, k = qkv[:, :128].clone().view(5, 4, 32), qkv[:, 128:].clone().view(5, 2, 32)
    positions = torch.tensor([3, 0, 127, 64, 5])
    rope(positions, q, k)
    rope(positions, *qkv.split([128, 64], dim=1))
    assert torch.equal(qkv, torch.cat([q.view(5, -1), k.view(5, -1)], dim=1))


def test_partial_and_interleaved():
    rope = get_rope(32, 32, 128, is_neox_style=False, partial_rotary_factor=0.5)
    q, k = torch.randn(2, 1, 32), torch.randn(2, 1, 32)
    before = q.clone()
    rope(torch.tensor([0, 9]), q, k)
    assert torch.equal(q[..., 16:], before[..., 16:])
    pairs = torch.view_as_complex(before[..., :16].reshape(2, 1, 8, 2))
    angles = torch.tensor([[0.0], [9.0]]) * 10000.0 ** (-torch.arange(0, 16, 2) / 16)
    turned = torch.view_as_real(pairs * torch.polar(torch.ones(2, 8), angles)[:, None])
    torch.testing.assert_close(q[..., :16], turned.flatten(2))


class TestTable:
    def test_a_row_does_not_depend_on_how_the_table_grew(self):
        at_once, in_steps = (get_rope(24, 24, 20000) for _ in range(2))
        x = torch.randn(1, 1, 24)
        at_once(torch.tensor([19999]), x.clone(), x.clone())
        for position in (3, 4096, 9000, 19999):
            in_steps(torch.tensor([position]), x.clone(), x.clone())
        assert torch.equal(at_once.table.cos_sin, in_steps.table.cos_sin)
        assert at_once.table.cos_sin.shape == (20000, 24)

    def test_it_is_only_as_long_as_needed(self):
        rope = get_rope(24, 24, 1_000_000)
        rope(torch.tensor([17]), torch.randn(1, 1, 24), torch.randn(1, 1, 24))
        assert rope.table.cos_sin.shape[0] < 10_000

    def test_positions_outside_the_context_are_refused_and_change_nothing(self):
        rope = get_rope(24, 24, 100)
        q, k = torch.randn(2, 1, 24), torch.randn(2, 1, 24)
        before = q.clone()
        for position in (-1, 100):
            with pytest.raises(IndexError, match="must be from 0 to 99"):
                rope(torch.tensor([5, position]), q, k)
        assert torch.equal(q, before)

    def test_modules_of_a_model_share_one(self):
        layers = torch.nn.ModuleList([get_rope(24, 24, 100) for _ in range(3)])
        layers.append(get_rope(24, 24, 100, base=5.0))
        set_context_length(layers, 50)
        assert layers[0].table is layers[1].table is layers[2].table
        assert layers[3].table is not layers[0].table
        with pytest.raises(IndexError):
            layers[0](torch.tensor([50]), torch.randn(1, 1, 24), torch.randn(1, 1, 24))

    def test_it_stays_float32(self):
        rope = get_rope(24, 24, 100).to(torch.bfloat16)
        x = torch.randn(1, 1, 24, dtype=torch.bfloat16)
        rope(torch.tensor([9]), x, x.clone())
        assert rope.table.cos_sin.dtype == torch.float32

    def test_it_grows_for_others_too(self):
        rope = get_rope(24, 24, 100)
        rows = []
        with pytest.raises(IndexError, match="must be from 0 to 99"):
            rope.with_table(torch.tensor([100]), lambda _, table: table[100])
        rope.with_table(torch.tensor([99]), lambda _, table: rows.append(table[99]))
        assert len(rows) == 1

    def test_it_grows_no_further_than_is_asked(self):
        """Layers that share a table all ask; each of them used to double it."""
        table = get_rope(24, 24, 100_000).table
        sizes = []
        for largest in [0, 0, 4095, 4096, 4096, 50_000, 99_999, 99_999]:
            table.grow_for(torch.tensor([largest]))
            sizes.append(table.cos_sin.shape[0])
        assert sizes == [4096, 4096, 4096, 8192, 8192, 53_248, 100_000, 100_000]

    @pytest.mark.parametrize("default", ["cpu", "meta"])
    def test_the_default_device_changes_no_frequency(self, default):
        with torch.device(default):
            rope = get_rope(24, 24, 100)
        rope = rope.to_empty(device="cpu")
        x = torch.randn(1, 1, 24)
        expected = get_rope(24, 24, 100)(torch.tensor([9]), x.clone(), x.clone())[0]
        assert torch.equal(rope(torch.tensor([9]), x, x.clone())[0], expected)

    @pytest.mark.cuda
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
    def test_on_a_gpu_it_is_whole_and_moves_with_the_model(self):
        layers = torch.nn.ModuleList([get_rope(24, 24, 5000, base=5.0) for _ in range(2)])
        set_context_length(layers, 9000)
        layers.to("cuda", torch.bfloat16)
        table = layers[0].table
        assert layers[1].table is table
        assert table.cos_sin.shape == (9000, 24)
        assert (table.cos_sin.dtype, table.cos_sin.device.type) == (torch.float32, "cuda")
        on_cpu = get_rope(24, 24, 9000, base=5.0).table
        on_cpu.grow_for(torch.tensor([8999]))
        torch.testing.assert_close(table.cos_sin.cpu(), on_cpu.cos_sin, rtol=0, atol=3e-7)
        set_context_length(layers, 7000)
        assert layers[0].table is layers[1].table
        assert layers[0].table.cos_sin.shape == (7000, 24)
        assert layers[0].table.cos_sin.is_cuda
        assert layers.cpu()[0].table.cos_sin.shape == (0, 24)
        with torch.device("cuda"):
            made_there = get_rope(24, 24, 7000, base=5.0)
        assert torch.equal(made_there.table.cos_sin, layers.cuda()[0].table.cos_sin)


class TestDynamic:
    """Hugging Face's depends on the longest sequence so far; ours on the context length alone."""

    def rope(self, context_length):
        rope = rope_from_config(hf_config(SCALINGS["dynamic"]), 64)
        set_context_length(rope, context_length)
        return rope

    def rotated(self, rope, position):
        x = torch.ones(1, 1, 64)
        return rope(torch.tensor([position]), x, x.clone())[0]

    def test_no_scaling_up_to_the_trained_length(self):
        plain = get_rope(64, 64, MAX_POSITION, 500000.0)
        for context_length in (MAX_POSITION // 2, MAX_POSITION):
            actual = self.rotated(self.rope(context_length), 100)
            assert torch.equal(actual, self.rotated(plain, 100))

    def test_beyond_it_the_base_is_that_of_the_whole_context(self):
        config = hf_config(SCALINGS["dynamic"])
        expected, _ = ROPE_INIT_FUNCTIONS["dynamic"](config, seq_len=3 * MAX_POSITION)
        parameters = RopeParameters.read(config.rope_parameters)
        actual, _ = inverse_frequencies(parameters, 64, MAX_POSITION, 3 * MAX_POSITION)
        torch.testing.assert_close(actual, expected, rtol=2.5e-7, atol=0)

    def test_a_position_alone_decides(self):
        rope = self.rope(3 * MAX_POSITION)
        before = self.rotated(rope, 10)
        self.rotated(rope, 3 * MAX_POSITION - 1)
        assert torch.equal(self.rotated(rope, 10), before)


class TestLongrope:
    """The configured context length chooses the list, not the longest sequence of a batch."""

    def parameters(self, **values):
        config = hf_config({**SCALINGS["longrope"], **values})
        return config, RopeParameters.read(config.rope_parameters)

    @pytest.mark.parametrize("context_length", [10, 64, 65, MAX_POSITION])
    @pytest.mark.parametrize("values", [{}, {"factor": 8.0}, {"attention_factor": 0.7}])
    def test_is_hugging_faces_for_a_sequence_of_that_length(self, context_length, values):
        config, parameters = self.parameters(**values)
        ours, factor = inverse_frequencies(parameters, 64, MAX_POSITION, context_length)
        theirs, their_factor = ROPE_INIT_FUNCTIONS["longrope"](config, seq_len=context_length)
        torch.testing.assert_close(ours, theirs, rtol=2.5e-7, atol=0)
        assert factor == pytest.approx(their_factor, rel=1e-12)

    def test_a_position_alone_decides(self):
        config, _ = self.parameters()
        rope = rope_from_config(config, 64)
        set_context_length(rope, MAX_POSITION)
        x = torch.ones(1, 1, 64)
        before = rope(torch.tensor([10]), x.clone(), x.clone())[0]
        rope(torch.tensor([MAX_POSITION - 1]), x.clone(), x.clone())
        assert torch.equal(rope(torch.tensor([10]), x.clone(), x.clone())[0], before)

    def test_a_list_of_the_wrong_length_is_refused(self):
        _, parameters = self.parameters()
        with pytest.raises(CheckpointError, match="short_factor has 32 numbers, but 24 pairs"):
            inverse_frequencies(parameters, 48, MAX_POSITION, 64)

    @pytest.mark.parametrize("factors", [2.0, [1.0, 0.0], [1.0, "2"], None])
    def test_a_list_must_be_one_of_numbers(self, factors):
        with pytest.raises(CheckpointError, match="long_factor"):
            RopeParameters.read({**SCALINGS["longrope"], "long_factor": factors})


class TestReading:
    def test_both_spellings(self):
        new = RopeParameters.read({**LLAMA3, "rope_theta": 500000.0})
        old = RopeParameters.read(
            {"type": "llama3", **{k: v for k, v in LLAMA3.items() if k != "rope_type"}}, 500000.0
        )
        assert new == old
        assert RopeParameters.read(None) == RopeParameters.read({"rope_type": "default"})

    def test_configs_of_older_transformers(self):
        class Config:
            max_position_embeddings = 128
            rope_theta = 777.0
            rope_scaling = {"type": "linear", "factor": 2.0}  # noqa: RUF012

        parameters = rope_from_config(Config, 32).parameters
        assert (parameters.kind, parameters.base, parameters["factor"]) == ("linear", 777.0, 2.0)

    def test_unknown_kinds_are_refused_by_name(self):
        with pytest.raises(UnsupportedModelError, match=r"'unheard-of' is not implemented"):
            RopeParameters.read({"rope_type": "unheard-of"})

    def test_a_missing_number_is_named(self):
        with pytest.raises(CheckpointError, match="'llama3' needs 'low_freq_factor'"):
            RopeParameters.read({"rope_type": "llama3", "factor": 8.0})

    @pytest.mark.parametrize("factor", [0, -1.0, float("nan"), "8"])
    def test_a_number_must_be_one(self, factor):
        with pytest.raises(CheckpointError, match=r"factor=.* must be a number above 0"):
            RopeParameters.read({"rope_type": "linear", "factor": factor})

    def test_what_the_architecture_does_not_have_is_refused(self):
        config = hf_config({"rope_type": "default"})
        config.rope_parameters = {"partial_rotary_factor": 0.5}
        with pytest.raises(UnsupportedModelError, match=r"partial_rotary_factor=0\.5"):
            rope_from_config(config, 64)
        config.rope_parameters = {"full_attention": {}, "sliding_attention": {}}
        with pytest.raises(UnsupportedModelError, match="full_attention, sliding_attention"):
            rope_from_config(config, 64)

    def test_a_share_of_the_channels_where_the_architecture_has_it(self):
        config = hf_config({"rope_type": "default"})
        config.rope_parameters = {"partial_rotary_factor": 0.5, "rope_theta": 777.0}
        rope = rope_from_config(config, 64, is_partial=True, is_neox_style=False)
        assert (rope.head_dim, rope.rotary_dim, rope.is_interleaved) == (64, 32, True)
        config.rope_parameters = {"partial_rotary_factor": None}
        assert rope_from_config(config, 64, is_partial=True).rotary_dim == 64

    def test_a_table_for_each_kind_of_layer(self):
        config = hf_config({"rope_type": "default"})
        config.rope_parameters = {
            "full_attention": {"rope_theta": 5.0},
            "sliding_attention": {"rope_theta": 7.0},
        }
        for kind, base in (("full_attention", 5.0), ("sliding_attention", 7.0)):
            assert rope_from_config(config, 64, layer_type=kind).parameters.base == base
        with pytest.raises(CheckpointError, match="there are none for 'chunked_attention'"):
            rope_from_config(config, 64, layer_type="chunked_attention")

    def test_an_odd_width_is_refused(self):
        with pytest.raises(ValueError, match="rotary_dim=33 is not allowed"):
            get_rope(64, 33, 128)


@pytest.mark.parametrize(
    ("scaling", "default", "largest"),
    [
        ("default", 256, 256),
        ("llama3", 256, 256),
        ("linear", 256, 1024),
        ("dynamic", 256, 1024),
        ("longrope", 64, 256),
        ("yarn-attention-factor", 1024, 1024),
        ("yarn", 256, 256),
    ],
)
def test_how_far_each_kind_reaches(scaling, default, largest):
    rope = rope_from_config(hf_config(SCALINGS[scaling]), 64)
    assert (rope.default_context_length, rope.max_context_length) == (default, largest)
