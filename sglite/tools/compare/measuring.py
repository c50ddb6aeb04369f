"""Logits and layers of one model against what is expected of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from sglite.llm import LLM
from sglite.tools.compare.layers import (
    Expectation,
    LayerErrors,
    LayerResult,
    errors_between,
    layer_errors,
    layer_results,
)
from sglite.tools.compare.limits import LIMITS, Limits
from sglite.tools.compare.matching import Layout
from sglite.tools.compare.metrics import Closeness
from sglite.tools.compare.ours import Text, forced_logits
from sglite.tools.compare.routing import Guide, RoutingResult


@dataclass(frozen=True, slots=True)
class LogitsResult:
    """Logits of one phase against Hugging Face's in float32.

    Attributes:
        dtype: that sglite ran in.
        phase: "prefill" or "decode".
        prompt_tokens: of the one prompt; None: over all prompts.
        found: how near they are.
        own: how near Hugging Face in the same dtype is; None for float32.
        failure: what is too large, in words; "" where nothing is. Limits are for all prompts
            together.
    """

    dtype: str
    phase: str
    prompt_tokens: int | None
    found: Closeness
    own: Closeness | None
    failure: str = ""


@dataclass(frozen=True, slots=True)
class Measurement:
    """How near one model is, in one dtype.

    Attributes:
        limits: of the dtype.
        logits: per phase a row for each prompt, and one over all.
        layers: a row for each layer.
        errors: of the layers at every position; None where it is not known where they lie.
        module_limit: the error of a module's output, at the worst position, that is certainly one.
        tie: two of the reference's logits that are no further apart may change places.
        guide: to the reference's experts, where it has any.
        routing: a row for each mixture of experts.
    """

    limits: Limits
    logits: list[LogitsResult]
    layers: list[LayerResult]
    errors: LayerErrors | None
    module_limit: float
    tie: float
    guide: Guide | None
    routing: list[RoutingResult]

    @property
    def failure(self) -> str:
        """The first thing that is above its limit, in words; "" where nothing is."""
        for row in self.logits:
            if row.failure:
                return row.failure
        for layer in self.layers:
            if not layer.passed:
                return f"{layer.path}: relative error {layer.relative_error:.2g}"
        return ""


def measure(
    llm: LLM,
    layout: Layout | None,
    texts: Sequence[Text],
    expected: Sequence[Expectation],
    own: Sequence[Expectation] | None,
) -> Measurement:
    """Runs texts and compares.

    Args:
        llm: the model.
        layout: where its layers lie, and those of the reference.
        texts: to run.
        expected: of Hugging Face in float32.
        own: of Hugging Face in the dtype of `llm`; None for float32.
    """
    limits = LIMITS[llm.config.dtype]
    guide = Guide.within_rounding(
        limits,
        [each.choices for each in expected],
        None if own is None else [each.choices for each in own],
    )
    if guide is not None and not guide.fits(llm.model):
        guide = None
    ours = forced_logits(llm, texts) if guide is None else _guided_logits(llm, texts, guide)
    routing = guide.results(limits.dtype) if guide is not None else []
    logits = _logits_results(ours, texts, expected, own, limits)
    errors = own_errors = None
    layers: list[LayerResult] = []
    if layout is not None:
        errors = layer_errors(llm, layout, texts, expected, guide)
        if own is not None:
            pair = [[each.layers for each in found] for found in (own, expected)]
            own_errors = errors_between(layout, *pair)
        layers = layer_results(errors, own_errors, limits)
    return Measurement(
        limits=limits,
        logits=logits,
        layers=layers,
        errors=errors,
        module_limit=limits.for_modules(own_errors.largest if own_errors else None),
        tie=_tie(limits, logits, expected),
        guide=guide,
        routing=routing,
    )


def _guided_logits(llm: LLM, texts: Sequence[Text], guide: Guide) -> list[Tensor]:
    """As `forced_logits`, each text alone, since a guide has to know whose tokens it sees."""
    found: list[Tensor] = []
    for number, text in enumerate(texts):
        with guide.on(llm.model, number):
            found += forced_logits(llm, [text], cuda_graphs=False)
    return found


def _logits_results(
    ours: Sequence[Tensor],
    texts: Sequence[Text],
    expected: Sequence[Expectation],
    own: Sequence[Expectation] | None,
    limits: Limits,
) -> list[LogitsResult]:
    theirs = [each.logits for each in expected]
    results = []
    for phase, part in (("prefill", _of_prompt), ("decode", _behind_prompt)):
        found = _closeness(part, texts, ours, theirs)
        rows: list[Closeness | None] = [None] * len(found)
        own_over = None
        if own is not None:
            rows = _closeness(part, texts, [each.logits for each in own], theirs)
            own_over = Closeness.over(rows)
        results += [
            LogitsResult(limits.dtype, phase, len(text.prompt), a, b)
            for text, a, b in zip(texts, found, rows, strict=True)
        ]
        over = Closeness.over(found)
        failure = limits.broken_by(phase, over, own_over)
        results.append(LogitsResult(limits.dtype, phase, None, over, own_over, failure))
    return results


def _closeness(
    part: Callable[[Tensor, Text], Tensor],
    texts: Sequence[Text],
    found: Sequence[Tensor],
    expected: Sequence[Tensor],
) -> list[Closeness]:
    triples = zip(found, expected, texts, strict=True)
    return [Closeness.of(part(a, text), part(b, text)) for a, b, text in triples]


def _of_prompt(rows: Tensor, text: Text) -> Tensor:
    return rows[: len(text.prompt) - text.first_row]


def _behind_prompt(rows: Tensor, text: Text) -> Tensor:
    return rows[len(text.prompt) - text.first_row :]


def _tie(limits: Limits, logits: Sequence[LogitsResult], expected: Sequence[Expectation]) -> float:
    """Two logits change places only if they are apart by at most twice what each may be off."""
    if limits.is_relative:
        rows = (each.logits for each in expected)
        spread = max((r - r.mean(-1, keepdim=True)).abs().max().item() for r in rows)
        return 2 * limits.decode * spread
    own = max(row.own.largest for row in logits)
    return 2 * max(limits.decode, limits.times_own * own)
