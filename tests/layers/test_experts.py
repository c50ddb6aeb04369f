"""SparseMLP: hooks and subclasses see the experts, with the same bits; refusals."""

import pytest
import torch
from transformers import Qwen2MoeConfig
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

from sglite import ops
from sglite.layers import GatedMLP, GeluAndMul, SparseMLP

EXPERTS, TOP_K, HIDDEN, WIDTH, SHARED = 6, 3, 32, 20, 28


def make(dtype=torch.float32, shared_size=SHARED):
    """A layer with random weights, and Hugging Face's with the same."""
    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        hidden_size=HIDDEN,
        moe_intermediate_size=WIDTH,
        shared_expert_intermediate_size=SHARED,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        norm_topk_prob=True,
    )
    config._experts_implementation = "eager"
    theirs = Qwen2MoeSparseMoeBlock(config)
    for parameter in theirs.parameters():
        parameter.data = torch.randn(parameter.shape) / parameter.shape[-1] ** 0.5
    ours = SparseMLP(HIDDEN, WIDTH, EXPERTS, TOP_K, normalize=True, shared_size=shared_size)
    ours.gate.weight = theirs.gate.weight
    for i, expert in enumerate(ours.experts):
        expert.gate_up_proj.weight = theirs.experts.gate_up_proj[i]
        expert.down_proj.weight = theirs.experts.down_proj[i]
    if shared_size:
        shared = theirs.shared_expert
        ours.shared_expert.gate_up_proj.weight = torch.cat(
            [shared.gate_proj.weight, shared.up_proj.weight]
        )
        ours.shared_expert.down_proj.weight = shared.down_proj.weight
        ours.shared_expert_gate.weight = theirs.shared_expert_gate.weight
    return ours.to(dtype), theirs


def test_is_hugging_faces():
    ours, theirs = make()
    x = torch.randn(30, HIDDEN)
    expected = theirs(x[None])[0].detach()
    torch.testing.assert_close(ours(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shared_size", [None, SHARED])
def test_a_row_alone_is_the_same_bits(dtype, shared_size):
    ours, _ = make(dtype, shared_size)
    x = torch.randn(33, HIDDEN).to(dtype)
    whole = ours(x)
    for row in range(33):
        assert torch.equal(ours(x[row : row + 1]), whole[row : row + 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_hook_sees_its_expert_and_changes_no_bit(dtype):
    ours, _ = make(dtype)
    x = torch.randn(30, HIDDEN).to(dtype)
    expected = ours(x)
    seen = []
    ours.experts[4].down_proj.register_forward_hook(lambda *args: seen.append(args[2].shape))
    assert torch.equal(ours(x), expected)
    assert len(seen) == 1
    assert 0 < seen[0][0] < 30


def test_experts_that_no_token_uses_are_not_looked_at():
    ours, _ = make()
    x = torch.randn(1, HIDDEN)
    expected = ours(x)
    chosen = ours.gate(x).topk(TOP_K).indices[0].tolist()
    for number in set(range(EXPERTS)) - set(chosen):
        ours.experts[number] = GatedMLP(HIDDEN, WIDTH)  # without weights: an error, if it is run
    assert torch.equal(ours(x), expected)


def test_experts_of_several_activations():
    ours, _ = make(shared_size=None)
    ours.experts[1].act_fn = GeluAndMul()
    x = torch.randn(12, HIDDEN)
    expected = torch.zeros(x.shape)
    weights, chosen = ops.route(ours.gate(x), TOP_K, normalize=True)
    for row in range(12):
        for place in chosen[row].argsort().tolist():
            given = ours.experts[chosen[row, place]](x[row : row + 1])[0]
            expected[row] += given * weights[row, place]
    assert torch.equal(ours(x), expected)


def test_a_subclass_is_run():
    class Silent(GatedMLP):
        def forward(self, x):
            return torch.zeros_like(x)

    ours, _ = make(shared_size=None)
    ours.experts = torch.nn.ModuleList(Silent(HIDDEN, WIDTH) for _ in range(EXPERTS))
    assert not ours(torch.randn(3, HIDDEN)).any()


@pytest.mark.parametrize("top_k", [0, 7])
def test_more_experts_than_there_are(top_k):
    with pytest.raises(ValueError, match=f"cannot use {top_k} of 6 experts"):
        SparseMLP(HIDDEN, WIDTH, EXPERTS, top_k, normalize=True)
