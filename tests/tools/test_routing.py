"""Mixtures of experts in `sglite.compare`: near ties are told apart, and bugs of routing named."""

import random

import pytest
import torch
from torch import nn

import sglite
from sglite import register
from sglite.models.mixtral import MixtralForCausalLM
from sglite.models.qwen3_moe import Qwen3MoeForCausalLM
from sglite.tools.compare import texts as compared_texts
from sglite.tools.compare.limits import LIMITS
from sglite.tools.compare.ours import Text
from sglite.tools.compare.routing import Choices, Guide
from sglite.tools.compare.texts import TextResult
from tests.checkpoints import CONFIGS, VOCAB_SIZE, make_checkpoint

_EXPERTS = [name for name in CONFIGS if "mixtral" in name or "moe" in name]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """The folder of a name in `CONFIGS` in bfloat16, made once."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = make_checkpoint(tmp_path_factory.mktemp(name), name, dtype=torch.bfloat16)
        return made[name]

    return get


@pytest.mark.parametrize("architecture", [None, "transformers"])
@pytest.mark.parametrize("name", _EXPERTS)
def test_right_models_pass_in_bfloat16(checkpoints, name, architecture):
    draw = random.Random(0)
    prompts = [[draw.randrange(VOCAB_SIZE) for _ in range(length)] for length in (1, 17, 400)]
    report = sglite.compare(
        checkpoints(name), prompts=prompts, itself=False, new_tokens=8, architecture=architecture
    )
    assert report.passed, str(report)
    tokens = {row.tokens for row in report.routing}
    assert tokens == {sum(row.prompt_tokens + 7 for row in report.texts)}
    assert not any(row.others for row in report.routing), str(report)
    low = [row for row in report.routing if row.dtype == "bfloat16"]
    assert any(row.ties for row in low), "no near tie: this shows nothing"
    assert "near ties" in str(report)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_near_tie_is_no_error_and_none_is_made_up(dtype):
    """The second and the third expert of four are apart by a given gap."""

    def guide(gap):
        scores = torch.tensor([[3.0, 1.0 + gap, 1.0, -2.0]])
        exact = [[Choices(scores, torch.tensor([[0, 1]]), torch.tensor([[0.8, 0.2]]))]]
        own = [[Choices(scores + 0.01, *(getattr(exact[0][0], n) for n in ("experts", "weights")))]]
        return Guide.within_rounding(LIMITS[dtype], exact, own if dtype == "bfloat16" else None)

    tie = guide(0.0).ties[0]
    assert tie == pytest.approx(2 * (2 * 0.01 + 3 * 2.0**-8) if dtype == "bfloat16" else 6e-4)

    class Mixture(nn.Module):
        """Experts as transformers has them, which give what they were called with."""

        num_experts, is_transposed = 4, False

        def forward(self, x, experts, weights):
            return experts, weights

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.experts = nn.Identity(), Mixture()

        def forward(self, chosen):
            self.gate(torch.zeros(1, 4))
            return self.experts(torch.zeros(1, 8), torch.tensor([chosen]), torch.ones(1, 2))

    def run(gap, chosen):
        model, given = Model(), guide(gap)
        with given.on(model, 0):
            experts, weights = model(chosen)
        (row,) = given.results(dtype)
        return experts[0].tolist(), weights[0].tolist(), (row.tokens, row.ties, row.others)

    near, far = 0.9 * tie, 1.1 * tie
    assert run(near, [1, 0]) == ([1, 0], [1, 1], (1, 0, 0))
    assert run(near, [0, 2]) == ([0, 1], pytest.approx([0.8, 0.2]), (1, 1, 0))
    assert run(far, [0, 2]) == ([0, 2], [1, 1], (1, 0, 1))
    assert run(near, [0, 3]) == ([0, 3], [1, 1], (1, 0, 1))
    assert run(near, [1, 2]) == ([1, 2], [1, 1], (1, 0, 1))


def plant(name, base, part, change):
    """Registers a subclass whose mixtures are changed once they are built."""

    @register(f"Planted-{name}")
    class Planted(base):
        def __init__(self, config, quant_config=None, prefix=""):
            super().__init__(config, quant_config, prefix)
            for layer in self.model.layers:
                change(getattr(layer, part))


def other_normalize(mixture):
    mixture.normalize = not mixture.normalize


def one_less(mixture):
    mixture.top_k -= 1


def shifted(mixture):
    def shift(mixture, _):  # once the weights are read
        if not hasattr(mixture, "is_shifted"):
            mixture.experts = nn.ModuleList([*mixture.experts[1:], mixture.experts[0]])
            mixture.is_shifted = True

    mixture.register_forward_pre_hook(shift)


def worst_first(mixture):
    mixture.gate.register_forward_hook(lambda *arguments: -arguments[2])


def biased(mixture):
    """As a correction that the checkpoint's model does not have."""
    bias = 0.3 * torch.arange(len(mixture.experts))
    mixture.gate.register_forward_hook(lambda *arguments: arguments[2] + bias)


PLANTED = [
    ("normalize", other_normalize, ""),
    ("one-less", one_less, ""),
    ("shifted", shifted, ""),
    ("worst-first", worst_first, ".gate"),
    ("biased", biased, ".gate"),
]
for _name, _change, _ in PLANTED:
    plant(f"{_name}-mixtral", MixtralForCausalLM, "block_sparse_moe", _change)
    plant(f"{_name}-qwen3-moe", Qwen3MoeForCausalLM, "mlp", _change)


@pytest.mark.parametrize(("bug", "_", "part"), PLANTED, ids=[bug for bug, *_ in PLANTED])
@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe"])
def test_a_planted_bug_of_routing_is_named(checkpoints, name, bug, _, part):
    report = sglite.compare(
        checkpoints(name), architecture=f"Planted-{bug}-{name}", itself=False, new_tokens=2
    )
    mixture = "block_sparse_moe" if name == "mixtral" else "mlp"
    assert not report.passed
    assert report.first_divergence.path == f"model.layers.0.{mixture}{part}", str(report)


@pytest.mark.parametrize(("token", "passed"), [(3, True), (5, False)])
def test_a_text_that_parts_is_right_where_its_token_is_our_best(monkeypatch, token, passed):
    """Along the same text, with our own experts."""
    rows = torch.zeros(6, 8)
    rows[4, 3], rows[4, 5] = 2.0, 1.5  # behind two prompt tokens and three more
    monkeypatch.setattr(compared_texts, "forced_logits", lambda llm, texts: [rows])
    text = Text([1, 2], [1, 1, 1, token, 1])
    failed = TextResult(2, text.following, [1, 1, 1, 0, 1], None, None, 0.8, 3, 9.0, passed=False)
    (result,) = compared_texts.excuse_experts(None, [text], [failed], tie=0.1)
    assert result.passed is passed
    assert result.gap == 9.0
