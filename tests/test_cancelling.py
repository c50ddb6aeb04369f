"""Checkpoints whose sums are to cancel: those of every linear layer do."""

import pytest
import torch
from torch import nn

from tests.cancelling import let_sums_cancel
from tests.checkpoints import VOCAB_SIZE, make_model

# Dense and with experts; stacked matrices, one KV head, biases, tied heads, norms of all heads.
NAMES = (
    "llama-biases",
    "phi3",
    "glm4-bias",
    "starcoder2",
    "gemma2",
    "olmo2-bias",
    "mixtral",
    "qwen2-moe",
)


def shares_left(model):
    """What is left of the terms of sums, by the weight's path: |W x| against |W| |x|."""
    found = {}

    def measure(path, x, weight):
        total, terms = x @ weight.mT, x.abs() @ weight.abs().mT
        found[path] = float(total.norm() / terms.norm())
        return total

    def watch(path, module):
        if hasattr(module, "gate_up_proj") and not isinstance(module.gate_up_proj, nn.Module):

            def hook(module, arguments):
                both = measure(f"{path}.gate_up_proj", arguments[0], module.gate_up_proj)
                gate, up = both.chunk(2, dim=-1)
                measure(f"{path}.down_proj", module.act_fn(gate) * up, module.down_proj)
        elif not isinstance(module, nn.Embedding) and getattr(module, "weight", None) is not None:
            if module.weight.ndim != 2:
                return

            def hook(module, arguments):
                measure(path, arguments[0], module.weight)
        else:
            return
        module.register_forward_pre_hook(hook)

    for path, module in model.named_modules():
        watch(path, module)
    with torch.no_grad():
        model(torch.arange(5, VOCAB_SIZE, 7)[None])
    return found


@pytest.mark.parametrize("name", NAMES)
def test_sums_cancel_in_every_linear_layer(name):
    model = make_model(name)
    plain = shares_left(model)
    model = make_model(name)
    let_sums_cancel(model)
    left = shares_left(model)
    matrices = {
        path.removesuffix(".weight")
        for path, parameter in model.named_parameters()
        if parameter.ndim > 1 and "embed_tokens" not in path
    }
    assert left.keys() == matrices | {"lm_head"}
    for path, share in left.items():
        assert share < 0.02 < 0.08 < plain[path], path
