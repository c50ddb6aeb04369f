"""The first module whose output diverges from Hugging Face's while what it was given agrees."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from torch import Tensor, nn

from sglite.layers.embedding import Embedding
from sglite.llm import LLM
from sglite.tools.compare.layers import LayerErrors, record_ours, record_theirs
from sglite.tools.compare.matching import (
    Expected,
    Layout,
    Matcher,
    joined_values,
    layer_input,
    value_in,
)
from sglite.tools.compare.metrics import cosines, row_errors
from sglite.tools.compare.ours import Text
from sglite.tools.compare.recording import Record
from sglite.tools.compare.reference import Reference
from sglite.tools.compare.routing import Guide, steered

# An error within a layer may be so many times smaller in what the layer gives.
_DILUTED = 10


@dataclass(frozen=True, slots=True)
class Divergence:
    """Where a model first goes wrong.

    Attributes:
        path: of the module, such as "model.layers.0.self_attn.rotary_emb"; "" where it is no
            module.
        relative_error: of its output at the worst position; None where that is not it.
        position: the first whose error is above the limit.
        note: what else there is to say.
    """

    path: str
    relative_error: float | None = None
    position: int | None = None
    note: str = ""

    def __str__(self) -> str:
        parts = []
        if self.relative_error is not None:
            parts.append(f"relative error {self.relative_error:.2g}")
        if self.position is not None:
            parts.append(f"first at position {self.position}")
        text = "; ".join(filter(None, [", ".join(parts), self.note]))
        return f"{self.path}: {text}" if self.path else text


@dataclass(frozen=True, slots=True)
class PartResult:
    """One module's output where the first divergence was looked for.

    Attributes:
        path: of the module in our model.
        relative_error: the largest of a position; None where Hugging Face has no such tensor.
        cosine: the smallest of a position.
        input_error: of what it was given; None where that is not known.
    """

    path: str
    relative_error: float | None
    cosine: float | None
    input_error: float | None


@dataclass(slots=True)
class _Part:
    """A module with the errors of its positions."""

    record: Record
    expected: Expected | None
    errors: Tensor | None
    input_errors: Tensor | None
    cosine: float | None

    def result(self) -> PartResult:
        return PartResult(
            self.record.path,
            None if self.errors is None else self.errors.max().item(),
            self.cosine,
            None if self.input_errors is None else self.input_errors.max().item(),
        )


class Search:
    """Looks for the first divergence within some modules, on one text.

    Args:
        llm, reference: the two models.
        layout: of both.
        text: on which layers, or the logits, were seen to diverge.
        limit: relative error of a module's output that is a divergence.
        ours: paths of the modules to look at.
        theirs: paths to record in the reference.
        steering: what ours is run within.
    """

    def __init__(
        self,
        llm: LLM,
        reference: Reference,
        layout: Layout,
        text: Text,
        limit: float,
        ours: list[str],
        theirs: list[str],
        steering: AbstractContextManager,
    ):
        self._limit = limit
        self._layout = layout
        ours_recorded = record_ours(llm, text, ours, steering)
        theirs_recorded = record_theirs(reference, text, theirs)
        self._matcher = Matcher(layout, ours_recorded, theirs_recorded)
        self._parts = {
            path: self._measure(record) for path, record in ours_recorded.records.items()
        }

    @property
    def results(self) -> list[PartResult]:
        """Every module that was looked at, in the order of computation."""
        return [part.result() for part in self._parts.values()]

    def _measure(self, record: Record) -> _Part:
        expected = self._matcher.expected[record.path]
        if expected is None:
            return _Part(record, None, None, None, None)
        value_in, value_out = joined_values(record)
        errors = _errors(value_out, expected.outputs)
        angle = None if errors is None else cosines(value_out, expected.outputs).min().item()
        return _Part(record, expected, errors, _errors(value_in, expected.inputs), angle)

    def first(self, top: str) -> Divergence | None:
        """The first divergence among the modules below `top`; None where all agree."""
        found = self._first_below(top)
        if found is None:
            return None
        part, agreeing = found
        if part.input_errors is None or part.input_errors.max() > self._limit or not top:
            missing = self._unmatched_before(part, agreeing)
            if missing is not None:
                return missing
        note = ""
        if part.input_errors is not None and part.input_errors.max() > self._limit:
            note = (
                f"what it is given is off by {part.input_errors.max():.2g} already, although the "
                f"parts before it agree"
            )
        return self._divergence(part.record.path, part.errors, note)

    def of_whole_model(self) -> Divergence | None:
        """That of the model's own output, where no part of it diverges."""
        whole = self._parts.get("")
        if whole is None or whole.errors is None or whole.errors.max() <= self._limit:
            return None
        name = f"{type(whole.record.module).__name__}.forward"
        return self._divergence(name, whole.errors, "no module of it diverges by itself")

    def enters_differently(self) -> bool:
        """Whether the first layer is given something else than in the reference."""
        layer = f"{self._layout.ours}.0"
        ours, theirs = self._parts[layer].record, self._matcher.counterpart(layer)
        errors = _errors(layer_input(ours), value_in(theirs))
        return errors is not None and bool(errors.max() > self._limit)

    def _first_below(self, path: str) -> tuple[_Part, str | None] | None:
        """The innermost diverging part, and the path of the last one before it that agrees."""
        agreeing = None
        for child in self._children(path):
            part = self._parts[child]
            if part.errors is None:
                found = self._first_below(child)
                if found is not None:
                    return found[0], found[1] or agreeing
            elif part.errors.max() > self._limit:
                found = self._first_below(child)
                return (found[0], found[1] or agreeing) if found else (part, agreeing)
            else:
                agreeing = child
        return None

    def _children(self, path: str) -> Iterator[str]:
        """The recorded modules whose nearest recorded parent is `path`, in order."""
        for other in self._parts:
            parent = other.rpartition(".")[0]
            while parent and parent not in self._parts and parent != path:
                parent = parent.rpartition(".")[0]
            if other and other != path and parent == path:
                yield other

    def _unmatched_before(self, part: _Part, agreeing: str | None) -> Divergence | None:
        """What only one of the models has, between what agrees and what does not."""
        paths = list(self._parts)
        start = paths.index(agreeing) + 1 if agreeing else 0
        for path in paths[start : paths.index(part.record.path)]:
            own = self._parts[path]
            if own.expected is None and own.record.has_weights:
                note = (
                    f"Hugging Face has no part in its place; seen at {part.record.path}, while "
                    f"all before it agrees"
                )
                return self._divergence(path, part.errors, note)
        last = part.expected.last if part.expected else ""
        missing = self._matcher.without_counterpart(last)
        if not missing:
            return None
        path = self._layout.translate_back(missing[0].path)
        note = f"Hugging Face runs this part and sglite does not; seen at {part.record.path}"
        return self._divergence(path, part.errors, note)

    def _divergence(self, path: str, errors: Tensor, note: str) -> Divergence:
        (positions,) = (errors > self._limit).nonzero(as_tuple=True)
        return Divergence(path, errors.max().item(), int(positions[0]), note)


def find_first(
    llm: LLM,
    reference: Reference,
    layout: Layout,
    texts: Sequence[Text],
    limit: float,
    errors: LayerErrors,
    guide: Guide | None,
) -> tuple[Divergence | None, list[PartResult]]:
    """The first divergence over all texts, and the modules that were looked at for it.

    The layer is looked for first, and its parts then: models may do the same work in other parts
    (scale embeddings inside or outside of a module, say), but layer for layer they must agree.

    Args:
        llm, reference: the two models, in dtypes in which `limit` can be kept.
        layout: of both.
        texts: to run.
        limit: relative error of an output that is a divergence.
        errors: of all layers.
        guide: to the reference's experts, where it has any.
    """

    def steering(number: int) -> AbstractContextManager:
        return steered(guide, llm.model, number)

    largest = [[layer.max().item() for layer in text] for text in errors.errors]
    first = [next((i for i, e in enumerate(text) if e > limit), None) for text in largest]
    order = [
        (layer, len(texts[i].computed), i) for i, layer in enumerate(first) if layer is not None
    ]
    if not order:
        return _after_layers(llm, reference, layout, texts, limit, steering)
    layer, _, index = min(order)
    text = texts[index]
    # A layer passes its input on beside what it adds, which makes errors of its parts smaller.
    suspects = [i for i in range(layer) if largest[index][i] > limit / _DILUTED] + [layer]
    if suspects[0] == 0:
        search = _search_around_layers(
            llm, reference, layout, text, limit, steering(index), before=True
        )
        found = search.first("")
        if found is not None and search.enters_differently():
            return found, search.results
    for i in suspects:
        path = f"{layout.ours}.{i}"
        search = Search(
            llm,
            reference,
            layout,
            text,
            limit,
            _below(llm.model, path),
            _below(reference.model, f"{layout.theirs}.{i}"),
            steering(index),
        )
        found = search.first(path)
        if found is not None:
            return found, search.results
    (positions,) = (errors.errors[index][layer] > limit).nonzero(as_tuple=True)
    found = Divergence(
        f"{layout.ours}.{layer}",
        largest[index][layer],
        int(positions[0]),
        "none of its parts does by itself",
    )
    return found, search.results


def _after_layers(
    llm: LLM,
    reference: Reference,
    layout: Layout,
    texts: Sequence[Text],
    limit: float,
    steering: Callable[[int], AbstractContextManager],
) -> tuple[Divergence | None, list[PartResult]]:
    """The first divergence behind the last layer, where all layers agree."""
    results: list[PartResult] = []
    for number, text in enumerate(texts):
        search = _search_around_layers(
            llm, reference, layout, text, limit, steering(number), before=False
        )
        results = search.results
        found = search.first("") or search.of_whole_model()
        if found is not None:
            return found, results
    return None, results


def _search_around_layers(
    llm: LLM,
    reference: Reference,
    layout: Layout,
    text: Text,
    limit: float,
    steering: AbstractContextManager,
    *,
    before: bool,
) -> Search:
    """A search among what is not within a layer: before the first one, or behind the last one."""

    def paths(model: nn.Module, layers: str) -> list[str]:
        inner = layers.rpartition(".")[0]
        outside = [p for p, _ in model.named_modules() if not f"{p}.".startswith(f"{layers}.")]
        if before:
            return [p for p in outside if p and not f"{inner}.".startswith(f"{p}.")] + [
                f"{layers}.0"
            ]
        return [p for p in outside if not _is_embedding(model.get_submodule(p))]

    return Search(
        llm,
        reference,
        layout,
        text,
        limit,
        paths(llm.model, layout.ours),
        paths(reference.model, layout.theirs),
        steering,
    )


def _below(model: nn.Module, path: str) -> list[str]:
    return [
        name
        for name, _ in model.named_modules(remove_duplicate=False)
        if name.startswith(f"{path}.")
    ]


def _is_embedding(module: nn.Module) -> bool:
    return isinstance(module, Embedding | nn.Embedding)


def _errors(actual: Tensor | None, expected: Tensor | None) -> Tensor | None:
    if actual is None or expected is None or actual.shape != expected.shape:
        return None
    return row_errors(actual, expected)
