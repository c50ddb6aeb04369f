"""Every decoder layer's output against Hugging Face's, over all texts."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from sglite.llm import LLM
from sglite.tools.compare.limits import Limits
from sglite.tools.compare.matching import Layout, layer_value, value_out
from sglite.tools.compare.metrics import cosines, row_errors
from sglite.tools.compare.ours import Text, forced_logits
from sglite.tools.compare.recording import ModuleRecorder
from sglite.tools.compare.reference import Reference
from sglite.tools.compare.routing import Choices, Guide, recording, steered


@dataclass(frozen=True, slots=True)
class LayerResult:
    """One decoder layer's output, over all positions of all texts.

    Attributes:
        dtype: that sglite ran in.
        path: of the layer in our model.
        relative_error: the largest `|a - b| / |b|` of a position.
        mean_error: the mean over positions.
        cosine: the smallest between the two of a position.
        first_position: the first one whose error is above the limit; None where none is.
        allowed: by the limits, of the largest error in float32 and of the mean otherwise.
        passed: whether it is within.
        own_error: mean error of Hugging Face in the run's dtype; None for float32.
    """

    dtype: str
    path: str
    relative_error: float
    mean_error: float
    cosine: float
    first_position: int | None
    allowed: float
    passed: bool
    own_error: float | None


@dataclass(frozen=True, slots=True)
class LayerErrors:
    """Errors of each layer at each position of each text: [layers] of [positions]."""

    paths: list[str]
    errors: list[list[Tensor]]  # per text, per layer
    cosines: list[list[Tensor]]

    def first_above(self, index: int, limit: float) -> int | None:
        """The first position of any text at which a layer's error is above a limit."""
        places = [(text[index] > limit).nonzero() for text in self.errors]
        return min((int(found[0]) for found in places if len(found)), default=None)

    @property
    def largest(self) -> float:
        """The largest error of all."""
        return max(layer.max().item() for text in self.errors for layer in text)

    def of_layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Errors and cosines of a layer over all texts."""
        return (
            torch.cat([text[index] for text in self.errors]),
            torch.cat([text[index] for text in self.cosines]),
        )


def record_ours(
    llm: LLM, text: Text, paths: Sequence[str], steering: AbstractContextManager
) -> ModuleRecorder:
    """What goes through modules of ours: one prefill, and then a step for each token.

    Args:
        llm: the model.
        text: to run.
        paths: of the modules.
        steering: what to run it within, see `sglite.tools.compare.routing.steered`.
    """
    recorder = ModuleRecorder(llm.model, paths)
    with recorder.attached(), steering:
        forced_logits(llm, [text], chunked_prefill_size=max(1, len(text.prompt)), cuda_graphs=False)
    return recorder


def record_theirs(reference: Reference, text: Text, paths: Sequence[str]) -> ModuleRecorder:
    """What goes through modules of Hugging Face's."""
    recorder = ModuleRecorder(reference.model, paths)
    with recorder.attached():
        reference.logits(text.computed)
    return recorder


@dataclass(frozen=True, slots=True)
class Expectation:
    """What a reference gives for one text.

    Attributes:
        logits: of the positions that are compared, [positions, vocabulary] float32.
        layers: of each layer the output, [all positions, width]; empty where it is not known where
            the layers lie.
        choices: of each mixture of experts.
    """

    logits: Tensor
    layers: list[Tensor]
    choices: list[Choices]

    @classmethod
    def of_all(
        cls,
        reference: Reference,
        layout: Layout | None,
        texts: Sequence[Text],
        exact: "Sequence[Expectation] | None" = None,
    ) -> "list[Expectation]":
        """Runs the reference once for each text.

        Args:
            reference: the model.
            layout: where its layers lie.
            texts: to run.
            exact: what it gave in float32, whose experts it is to use; None: its own.
        """
        guide = None if exact is None else Guide.to_anything([each.choices for each in exact])
        return [cls._of(reference, layout, text, guide, i) for i, text in enumerate(texts)]

    @classmethod
    def _of(
        cls,
        reference: Reference,
        layout: Layout | None,
        text: Text,
        guide: Guide | None,
        number: int,
    ) -> "Expectation":
        paths = [f"{layout.theirs}.{i}" for i in range(layout.count)] if layout else []
        recorder = ModuleRecorder(reference.model, paths)
        with recorder.attached(), recording(reference.model, guide, number) as choices:
            logits = reference.logits(text.computed)
        layers = [value_out(recorder.records[path]) for path in paths]
        return cls(logits[text.first_row :], layers, choices)


def layer_errors(
    llm: LLM,
    layout: Layout,
    texts: Sequence[Text],
    expected: Sequence[Expectation],
    guide: Guide | None,
) -> LayerErrors:
    """How far each layer of ours is from what was expected of it."""
    paths = [f"{layout.ours}.{i}" for i in range(layout.count)]
    found = []
    for number, text in enumerate(texts):
        records = record_ours(llm, text, paths, steered(guide, llm.model, number)).records
        found.append([layer_value(records[path]) for path in paths])
    return errors_between(layout, found, [each.layers for each in expected])


def errors_between(
    layout: Layout, found: Sequence[Sequence[Tensor]], expected: Sequence[Sequence[Tensor]]
) -> LayerErrors:
    """Errors and cosines of the outputs of layers, both per text and layer."""
    pairs = [list(zip(*both, strict=True)) for both in zip(found, expected, strict=True)]
    return LayerErrors(
        [f"{layout.ours}.{i}" for i in range(layout.count)],
        [[row_errors(a, b) for a, b in text] for text in pairs],
        [[cosines(a, b) for a, b in text] for text in pairs],
    )


def layer_results(found: LayerErrors, own: LayerErrors | None, limits: Limits) -> list[LayerResult]:
    """A row for each layer, over all texts."""
    results = []
    for index, path in enumerate(found.paths):
        errors, angles = found.of_layer(index)
        own_error = None if own is None else own.of_layer(index)[0].mean().item()
        largest, mean = errors.max().item(), errors.mean().item()
        allowed = limits.for_modules(own_error)
        results.append(
            LayerResult(
                limits.dtype,
                path,
                relative_error=largest,
                mean_error=mean,
                cosine=angles.min().item(),
                first_position=found.first_above(index, allowed),
                allowed=allowed,
                passed=(largest if limits.is_relative else mean) <= allowed,
                own_error=own_error,
            )
        )
    return results
