"""How near logits, module outputs and texts are to each other."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

#: Of how many of the most probable tokens log-probabilities are compared.
TOP = 5
# Rows of logits that are worked on at a time hold so many floats.
_AT_ONCE = 1 << 24


@dataclass(frozen=True, slots=True)
class Closeness:
    """Logits against those of a reference, over some positions.

    Attributes:
        positions: how many.
        largest: difference of a log-probability among the reference's five largest.
        rms: root mean square of these differences.
        kl: the largest `sum p log(p / q)` in nats, p of the reference.
        reverse_kl: the largest `sum q log(q / p)`.
        top: share of the five most probable tokens that both have, on average.
        greedy: share of the positions with the same most probable token.
        relative_error: the largest `|a - b| / |b|` of a row, after its mean was taken off.
    """

    positions: int
    largest: float
    rms: float
    kl: float
    reverse_kl: float
    top: float
    greedy: float
    relative_error: float

    @classmethod
    def of(cls, actual: Tensor, expected: Tensor) -> "Closeness":
        """Compares logits [n, vocabulary] float32, n of 1 or more; NaN is infinitely far."""
        step = max(1, _AT_ONCE // expected.shape[-1])
        parts = [
            cls._of(a, e) for a, e in zip(actual.split(step), expected.split(step), strict=True)
        ]
        return cls.over(parts)

    @classmethod
    def _of(cls, actual: Tensor, expected: Tensor) -> "Closeness":
        ours, theirs = actual.log_softmax(-1), expected.log_softmax(-1)
        best = theirs.topk(min(TOP, theirs.shape[-1]), -1).indices
        differences = (ours.gather(-1, best) - theirs.gather(-1, best)).abs()
        own_best = ours.topk(best.shape[-1], -1).indices
        shared = (best[:, :, None] == own_best[:, None, :]).any(-1)
        p, q = theirs.exp(), ours.exp()
        kl = torch.where(p > 0, p * (theirs - ours), 0.0).sum(-1)
        reverse_kl = torch.where(q > 0, q * (ours - theirs), 0.0).sum(-1)
        centred = [x - x.mean(-1, keepdim=True) for x in (actual, expected)]
        return cls(
            positions=len(actual),
            largest=_largest(differences),
            rms=_finite(differences.double().square().mean().sqrt()),
            kl=_largest(kl),
            reverse_kl=_largest(reverse_kl),
            top=shared.double().mean().item(),
            greedy=(ours.argmax(-1) == theirs.argmax(-1)).double().mean().item(),
            relative_error=_largest(row_errors(*centred)),
        )

    @classmethod
    def over(cls, parts: Sequence["Closeness"]) -> "Closeness":
        """All positions of several comparisons."""
        count = sum(part.positions for part in parts)

        def mean(values):
            pairs = zip(values, parts, strict=True)
            return sum(value * part.positions for value, part in pairs) / count

        return cls(
            positions=count,
            largest=max(part.largest for part in parts),
            rms=mean([part.rms**2 for part in parts]) ** 0.5,
            kl=max(part.kl for part in parts),
            reverse_kl=max(part.reverse_kl for part in parts),
            top=mean([part.top for part in parts]),
            greedy=mean([part.greedy for part in parts]),
            relative_error=max(part.relative_error for part in parts),
        )


def row_errors(actual: Tensor, expected: Tensor) -> Tensor:
    """`|a - b| / |b|` of each row, [n]; NaN counts as infinite.

    A row that all but vanishes is measured against a tenth of the median row instead.

    Args:
        actual: [n, width].
        expected: shaped like it.
    """
    lengths = expected.double().norm(dim=-1)
    scale = lengths.clamp(min=max(0.1 * lengths.median().item(), 1e-30))
    errors = (actual.double() - expected.double()).norm(dim=-1) / scale
    return errors.nan_to_num(nan=torch.inf, posinf=torch.inf)


def cosines(actual: Tensor, expected: Tensor) -> Tensor:
    """Cosine of the angle between the rows, [n]; 1 where both are zero."""
    lengths = actual.double().norm(dim=-1) * expected.double().norm(dim=-1)
    products = (actual.double() * expected.double()).sum(-1)
    return torch.where(lengths > 0, products / lengths, 1.0)


def rouge_l(actual: Sequence, expected: Sequence) -> float:
    """F-measure of the longest common subsequence; 1 where both are empty. (Lin, 2004.)"""
    if not actual and not expected:
        return 1.0
    lengths = [0] * (len(expected) + 1)
    for item in actual:
        diagonal = 0
        for i, other in enumerate(expected, 1):
            above = lengths[i]
            lengths[i] = diagonal + 1 if item == other else max(above, lengths[i - 1])
            diagonal = above
    return 2 * lengths[-1] / (len(actual) + len(expected))


def _largest(values: Tensor) -> float:
    return _finite(values.max()) if not values.isnan().any() else float("inf")


def _finite(value: Tensor) -> float:
    return value.nan_to_num(nan=torch.inf, posinf=torch.inf).item()
