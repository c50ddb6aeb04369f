"""Experts of a mixture behind Hugging Face's `ExpertsInterface`, one product for each expert.

A row's bits do not depend on how many rows its experts have, and a token's experts are added in
the order in which its router chose them.
"""

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from sglite import ops

#: The name of the function, as a config's `_experts_implementation` has it.
EXPERTS_IMPLEMENTATION = "sglite"


def run_experts(
    module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """What Hugging Face calls: [T, hidden_size], the weighted sum of each token's experts.

    Args:
        module: holds the experts' stacked weights, [experts, outputs, inputs] or transposed.
        hidden_states: [T, hidden_size].
        top_k_index: [T, k], the experts of each token.
        top_k_weights: [T, k].
    """
    num_tokens, k = top_k_index.shape
    chosen = top_k_index.reshape(-1)
    outputs = hidden_states.new_zeros(num_tokens * k, hidden_states.shape[-1])
    order = torch.argsort(chosen, stable=True)
    counts = torch.bincount(chosen, minlength=module.num_experts).tolist()
    start = 0
    for expert, count in enumerate(counts[: module.num_experts]):
        if not count:
            continue
        places = order[start : start + count]
        start += count
        x = hidden_states.index_select(0, places // k)
        name = "gate_up_proj" if module.has_gate else "up_proj"
        x = _product(module, name, expert, x)
        x = module._apply_gate(x) if module.has_gate else module.act_fn(x)
        x = _product(module, "down_proj", expert, x)
        if getattr(module, "has_post_expert_norm", False):
            x = module.post_expert_norm(x)
        outputs.index_copy_(0, places, x)
    weighted = (outputs * top_k_weights.reshape(-1, 1)).view(num_tokens, k, -1)
    total = weighted[:, 0]
    for index in range(1, k):
        total = total + weighted[:, index]
    return total.to(hidden_states.dtype)


def _product(module: nn.Module, name: str, expert: int, x: Tensor) -> Tensor:
    weight = getattr(module, name)[expert]
    bias = getattr(module, f"{name}_bias")[expert].contiguous() if module.has_bias else None
    if module.is_transposed:
        weight = weight.T.contiguous()
    return ops.linear(x.contiguous(), weight.detach(), None if bias is None else bias.detach())


ALL_EXPERTS_FUNCTIONS.register(EXPERTS_IMPLEMENTATION, run_experts)
