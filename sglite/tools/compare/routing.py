"""Which experts both models send their tokens to, and what is done about near ties.

A mixture of experts jumps: where the scores of two experts are as good as the same, rounding
decides which of them a token gets, and all that follows is off although nothing is wrong. So a
model is run with the reference's experts in place of its own where the two differ by experts whose
scores, in the reference's float32, are no further apart than rounding explains. A choice that
differs otherwise is left as it is, and shows as the error that it is.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sglite.layers.experts import SparseMLP
from sglite.tools.compare.limits import Limits

# What is asked wherever tokens are sent to experts, with the number of the mixture, scores
# [T, experts] and the experts chosen [T, k], both on the CPU. The answer is which rows' choices are
# to be replaced, [rows], and by which experts and weights, each [rows, k]; or None.
_Ask = Callable[[int, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor] | None]


@dataclass(frozen=True, slots=True)
class Choices:
    """Where one mixture sends the tokens of one text.

    Attributes:
        scores: what experts are chosen by, [T, experts] float32.
        experts: the chosen ones, [T, k] int64.
        weights: of their outputs, [T, k] float32.
    """

    scores: Tensor
    experts: Tensor
    weights: Tensor


@dataclass(frozen=True, slots=True)
class RoutingResult:
    """The choices of one mixture over all texts, against Hugging Face's in float32.

    Attributes:
        dtype: that sglite ran in.
        path: of the mixture in our model.
        tokens: that were sent to experts.
        ties: of these, with other experts, whose scores are as good as the same: they were computed
            with Hugging Face's.
        others: of these, with other experts for no such reason.
        tie: scores that are no further apart are as good as the same.
    """

    dtype: str
    path: str
    tokens: int
    ties: int
    others: int
    tie: float


@dataclass(slots=True)
class _Counts:
    tokens: int = 0
    ties: int = 0
    others: int = 0


@dataclass
class Guide:
    """Has a model send tokens to the reference's experts where its own choice is as good.

    Attributes:
        expected: the reference's choices, per text and mixture.
        ties: per mixture, how far apart scores may be that are as good as the same.
        counts: per mixture of the model that was guided last.
        paths: of these.
    """

    expected: Sequence[Sequence[Choices]]
    ties: Sequence[float]
    counts: list[_Counts] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)

    @classmethod
    def to_anything(cls, expected: Sequence[Sequence[Choices]]) -> "Guide":
        """One for the reference itself in another dtype, whose choices are always as good."""
        return cls(expected, [torch.inf] * len(expected[0]))

    @classmethod
    def within_rounding(
        cls,
        limits: Limits,
        expected: Sequence[Sequence[Choices]],
        own: Sequence[Sequence[Choices]] | None,
    ) -> "Guide | None":
        """One for our model; None where the reference has no experts.

        Args:
            limits: of the dtype.
            expected: of the reference in float32, per text.
            own: of the reference in the run's dtype; None for float32.
        """
        if not expected or not expected[0]:
            return None
        ties = []
        for index in range(len(expected[0])):
            scores = [text[index].scores for text in expected]
            if not all(rows.isfinite().all() for rows in scores):
                ties.append(-1.0)  # nothing is known about them
                continue
            largest = max(rows.abs().max().item() for rows in scores)
            off = 0.0
            if own is not None:
                pairs = zip(scores, (text[index].scores for text in own), strict=True)
                off = max((a - b).abs().max().item() for a, b in pairs)
            # Two scores, each of which may be off by so much.
            ties.append(2 * limits.for_scores(largest, off))
        return cls(expected, ties)

    @contextmanager
    def on(self, model: nn.Module, text: int) -> Iterator[None]:
        """Guides a model while it computes one text alone, from its first token on.

        Args:
            model: one that `fits`.
            text: its number.
        """
        mixtures = find_mixtures(model)
        expected = self.expected[text]
        self.paths = [mixture.path for mixture in mixtures]
        self.counts = self.counts or [_Counts() for _ in mixtures]
        starts = [0] * len(mixtures)

        def ask(index: int, scores: Tensor, experts: Tensor, weights: Tensor):
            start = starts[index]
            starts[index] += len(experts)
            return self._answer(index, expected[index], start, experts)

        with listening(mixtures, ask):
            yield

    def _answer(
        self, index: int, expected: Choices, start: int, experts: Tensor
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        stop = min(start + len(experts), len(expected.experts))
        theirs, scores = expected.experts[start:stop], expected.scores[start:stop]
        ours = experts[: stop - start]
        counts = self.counts[index]
        counts.tokens += len(experts)
        width = max(scores.shape[-1], 1 + int(ours.max()))
        scores = functional.pad(scores, (0, width - scores.shape[-1]), value=-torch.inf)
        only_ours, only_theirs = _members(ours, width), _members(theirs, width)
        only_ours, only_theirs = only_ours & ~only_theirs, only_theirs & ~only_ours
        either = only_ours | only_theirs
        differs = either.any(-1)
        gaps = scores.masked_fill(~either, -torch.inf).amax(-1)
        gaps = gaps - scores.masked_fill(~either, torch.inf).amin(-1)
        is_tie = differs & (gaps <= self.ties[index]) & (only_ours.sum(-1) == only_theirs.sum(-1))
        counts.ties += int(is_tie.sum())
        counts.others += int((differs & ~is_tie).sum())
        (rows,) = is_tie.nonzero(as_tuple=True)
        if not len(rows):
            return None
        return rows, theirs[rows], expected.weights[start + rows]

    def fits(self, model: nn.Module) -> bool:
        """Whether a model has as many mixtures as the reference."""
        return len(find_mixtures(model)) == len(self.ties)

    def results(self, dtype: str) -> list[RoutingResult]:
        """What was seen so far, mixture by mixture."""
        return [
            RoutingResult(dtype, path, counts.tokens, counts.ties, counts.others, tie)
            for path, counts, tie in zip(self.paths, self.counts, self.ties, strict=True)
        ]


def steered(guide: Guide | None, model: nn.Module, text: int) -> AbstractContextManager[None]:
    """`guide.on(model, text)`, or nothing where there is no guide."""
    return nullcontext() if guide is None else guide.on(model, text)


class _Native:
    """A mixture of the library's own, which chooses by the logits of its `gate`."""

    def __init__(self, path: str, module: SparseMLP):
        self.path = self.block_path = path
        self._module = module

    def attach(self, stack: ExitStack, index: int, ask: _Ask) -> None:
        """Listens until `stack` is closed."""

        def hook(_: nn.Module, args: tuple, logits: Tensor) -> Tensor | None:
            scores = logits.detach().float().cpu()
            experts = scores.topk(self._module.top_k, -1).indices
            answer = ask(index, scores, experts, scores.softmax(-1).gather(-1, experts))
            if answer is None:
                return None
            rows, others, _ = answer
            return self._exchanged(scores, experts, rows, others).to(logits)

        stack.callback(self._module.gate.register_forward_hook(hook).remove)

    @staticmethod
    def _exchanged(scores: Tensor, experts: Tensor, rows: Tensor, others: Tensor) -> Tensor:
        """Scores in which the experts wanted have changed places with those that were chosen."""
        changed = scores.clone()
        for row, wanted in zip(rows.tolist(), others.tolist(), strict=True):
            had = experts[row].tolist()
            out = [expert for expert in had if expert not in wanted]
            into = [expert for expert in wanted if expert not in had]
            changed[row, into], changed[row, out] = scores[row, out], scores[row, into]
        return changed


class _HuggingFace:
    """Experts of a Hugging Face class, which are called with what a router beside them has chosen.

    Args:
        path: of the experts.
        module: themselves.
        beside: the other parts of the module that they lie in.
    """

    def __init__(self, path: str, module: nn.Module, beside: Sequence[nn.Module]):
        self.path = path
        self.block_path = path.rpartition(".")[0]
        self._module = module
        self._beside = beside
        self._scores: Tensor | None = None

    def attach(self, stack: ExitStack, index: int, ask: _Ask) -> None:
        """Listens until `stack` is closed."""

        def route(router: nn.Module, args: tuple, output: Any) -> None:
            found = output[0] if isinstance(output, tuple) else output
            if isinstance(found, Tensor) and found.shape[-1] == self._module.num_experts:
                self._scores = _scores(router, found)

        def choose(_: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            x, experts, weights = [*args, *kwargs.values()][:3]
            chosen = experts.detach().cpu().long()
            scores, self._scores = self._scores, None
            if scores is None or len(scores) != len(chosen):
                # Nothing is known of ties: the chosen ones are infinitely far above all others.
                scores = torch.full((len(chosen), 1 + int(chosen.max())), -torch.inf)
                scores = scores.scatter(-1, chosen, 0.0)
            answer = ask(index, scores, chosen, weights.detach().float().cpu())
            if answer is None:
                return None
            rows, others, factors = answer
            rows = rows.to(experts.device)
            experts = experts.index_copy(0, rows, others.to(experts))
            weights = weights.index_copy(0, rows, factors.to(weights))
            return (x, experts, weights), {}

        for part in self._beside:
            stack.callback(part.register_forward_hook(route).remove)
        handle = self._module.register_forward_pre_hook(choose, with_kwargs=True)
        stack.callback(handle.remove)


def find_mixtures(model: nn.Module) -> list[_Native | _HuggingFace]:
    """The mixtures of experts of a model of ours or of Hugging Face's, in order."""
    found: list[_Native | _HuggingFace] = []
    for path, module in model.named_modules():
        if isinstance(module, SparseMLP):
            found.append(_Native(path, module))
        # What transformers' ExpertsInterface gives to the experts that it runs.
        elif hasattr(module, "num_experts") and hasattr(module, "is_transposed"):
            parent = model.get_submodule(path.rpartition(".")[0])
            beside = [part for part in parent.children() if part is not module]
            found.append(_HuggingFace(path, module, beside))
    return found


@contextmanager
def listening(mixtures: Sequence[_Native | _HuggingFace], ask: _Ask) -> Iterator[None]:
    """Asks at each of the mixtures while the block runs."""
    with ExitStack() as stack:
        for index, mixture in enumerate(mixtures):
            mixture.attach(stack, index, ask)
        yield


@contextmanager
def recording(model: nn.Module, guide: Guide | None, text: int) -> Iterator[list[Choices]]:
    """Keeps the choices of a reference, which follows a guide if there is one.

    Gives a list that is filled when the block ends; the scores are the reference's own also where
    it was guided.
    """
    mixtures = find_mixtures(model)
    seen: list[Choices] = []
    kept: dict[int, Choices] = {}

    def ask(index: int, scores: Tensor, experts: Tensor, weights: Tensor):
        kept[index] = Choices(scores, experts, weights)
        return None

    with listening(mixtures, ask), steered(guide, model, text):
        yield seen
    seen += [kept[index] for index in sorted(kept)]


def _members(experts: Tensor, width: int) -> Tensor:
    """Which experts are among the chosen ones, [T, width] bool."""
    return torch.zeros(len(experts), width, dtype=torch.bool).scatter(-1, experts, value=True)


def _scores(router: nn.Module, logits: Tensor) -> Tensor:
    """What a router chooses by: its logits, or their sigmoid with a bias (DeepSeek V3)."""
    logits = logits.detach().float().cpu().flatten(0, -2)
    bias = getattr(router, "e_score_correction_bias", None)
    return logits if bias is None else logits.sigmoid() + bias.detach().float().cpu()
