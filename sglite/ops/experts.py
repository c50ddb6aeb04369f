"""Mixture of experts: which experts a row goes to, and what they give together."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sglite.ops.fused_linear import gated_linear
from sglite.ops.linear import linear
from sglite.ops.packed_weight import PackedWeight
from sglite.ops.quantized_weight import QuantizedWeight


def route(logits: Tensor, top_k: int, *, normalize: bool) -> tuple[Tensor, Tensor]:
    """The `top_k` experts with the largest `softmax(logits)`, and these as their weights.

    (Shazeer et al., 2017; Fedus et al., 2022.)

    Args:
        logits: [T, num_experts] float32.
        top_k: experts of a row.
        normalize: whether weights are divided by their sum.

    Returns:
        Weights [T, top_k] float32, and experts [T, top_k] int64; the largest weight comes first.
    """
    weights, experts = logits.softmax(-1).topk(top_k, dim=-1)
    if normalize:
        # Added one by one, so that the order does not depend on the number of rows.
        total = weights[:, 0]
        for column in range(1, top_k):
            total = total + weights[:, column]
        weights = weights / total[:, None]
    return weights, experts


def rows_of_experts(experts: Tensor, num_experts: int) -> list[tuple[int, Tensor, Tensor]]:
    """The rows that go to each expert that has any: (expert, rows, places), ascending.

    Args:
        experts: [T, top_k] int64, those of a row differ.
        num_experts: how many there are.

    Returns:
        Per expert its rows [n] int64, ascending, and where in `experts.flatten()` it is theirs.
    """
    flat = experts.flatten()
    counts = flat.bincount(minlength=num_experts).tolist()
    places = flat.argsort(stable=True).split(counts)
    return [(expert, own // experts.shape[1], own) for expert, own in enumerate(places) if len(own)]


def mix_experts(
    x: Tensor,
    weights: Tensor,
    experts: Tensor,
    gate_up: Sequence[PackedWeight | QuantizedWeight | Tensor],
    down: Sequence[PackedWeight | QuantizedWeight | Tensor],
    *,
    activation: str,
    batch_invariant: bool = False,
) -> Tensor:
    """`out[i] = sum over j of weights[i, j] * down_e(gated(gate_up_e(x[i])))`, e = experts[i, j].

    Products and sums of what the experts give are float32, added in ascending order of the experts,
    and rounded once: a row's bits do not depend on the other rows.

    Args:
        x: [T, hidden], float32, bfloat16 or float16.
        weights: [T, top_k] float32.
        experts: [T, top_k] int64, those of a row differ.
        gate_up: per expert [2 * width, hidden], gate, then up, as `linear` takes them.
        down: per expert [hidden, width].
        activation: as in `gated_linear`.
        batch_invariant: see `linear`.

    Returns:
        [T, hidden], the dtype of `x`.
    """
    total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    factors = weights.flatten()
    for expert, rows, places in rows_of_experts(experts, len(gate_up)):
        inner = gated_linear(
            x[rows], gate_up[expert], activation=activation, batch_invariant=batch_invariant
        )
        out = linear(inner, down[expert], batch_invariant=batch_invariant)
        total.index_add_(0, rows, out.float() * factors[places, None])
    return total.to(x.dtype)
