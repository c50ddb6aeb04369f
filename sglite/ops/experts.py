"""Mixture of experts: which experts a row goes to, and what they give together."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sglite import _C
from sglite.ops.decoder_layers import LinearPart
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
        Weights [T, top_k] float32, and experts [T, top_k] int64; the largest weight comes first,
        on the CPU the first expert of those with equal logits.

    Raises:
        ValueError: a shape or dtype differs from the above; the message names it.
    """
    if not _C.on_gpu(logits):
        weights = logits.new_empty((logits.shape[0], top_k))
        experts = torch.empty_like(weights, dtype=torch.int64)
        _C.route(weights, experts, logits, normalize)
        return weights, experts
    weights, experts = logits.softmax(-1).topk(top_k, dim=-1)
    if normalize:
        # Added one by one, so that the order does not depend on the number of rows.
        total = weights[:, 0]
        for column in range(1, top_k):
            total = total + weights[:, column]
        weights = weights / total[:, None]
    return weights, experts


def used_experts(experts: Tensor, num_experts: int) -> list[int]:
    """The experts that any row goes to, ascending.

    Args:
        experts: [T, top_k] int64, on the CPU.
        num_experts: how many there are.

    Raises:
        IndexError: there is no such expert.
    """
    return _C.used_experts(experts, num_experts)


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
    and rounded once: a row's bits do not depend on the other rows. On the CPU the work of all
    experts is one op, where their weights are packed or quantised; those of experts that no row
    goes to are not looked up. On a GPU so is the work of up to 128 experts for up to 512 rows, of
    bfloat16 or float16 with widths that are multiples of 8: the host does not wait to know which
    experts are used, and the bits are those of `linear` with `batch_invariant`.

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

    Raises:
        ValueError: a shape or dtype differs from the above; the message names it.
        IndexError: there is no such expert.
    """
    out = x.new_empty(x.shape)
    if _C.on_gpu(x):
        if _mix_on_gpu(out, x, weights, experts, list(gate_up), list(down), activation):
            return out
    else:
        used = _used_parts(experts, gate_up, down)
        if used is not None:
            _C.mix_experts(out, x, weights, experts, used, activation, _bytes)
            return out
    total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    factors = weights.flatten()
    for expert, rows, places in rows_of_experts(experts, len(gate_up)):
        inner = gated_linear(
            x[rows], gate_up[expert], activation=activation, batch_invariant=batch_invariant
        )
        out = linear(inner, down[expert], batch_invariant=batch_invariant)
        total.index_add_(0, rows, out.float() * factors[places, None])
    return total.to(x.dtype)


# For more the kernel, which reads an expert's weights once for every 16 rows, falls behind.
_MOST_KERNEL_ROWS = 512


def _mix_on_gpu(
    out: Tensor,
    x: Tensor,
    weights: Tensor,
    experts: Tensor,
    gate_up: list[Tensor],
    down: list[Tensor],
    activation: str,
) -> bool:
    """Whether the kernel takes these; then it has written `out`."""
    if len(x) > _MOST_KERNEL_ROWS or not all(isinstance(w, Tensor) for w in (*gate_up, *down)):
        return False

    def empty(count: int) -> Tensor:
        return x.new_empty(count, dtype=torch.uint8)

    return _C.mix_experts_cuda(out, x, weights, experts, gate_up, down, activation, empty)


def _used_parts(
    experts: Tensor,
    gate_up: Sequence[PackedWeight | QuantizedWeight | Tensor],
    down: Sequence[PackedWeight | QuantizedWeight | Tensor],
) -> list[tuple[int, LinearPart, LinearPart]] | None:
    """What the op takes of the experts that are used; None where it does not take them."""
    used = []
    for expert in used_experts(experts, len(gate_up)):
        parts = [_part(weights[expert]) for weights in (gate_up, down)]
        if None in parts:
            return None
        used.append((expert, *parts))
    return used


def _part(weight: PackedWeight | QuantizedWeight | Tensor) -> LinearPart | None:
    if isinstance(weight, PackedWeight | QuantizedWeight):
        return LinearPart.of(weight, None)
    return None


def _bytes(count: int) -> Tensor:
    return torch.empty(count, dtype=torch.uint8)
