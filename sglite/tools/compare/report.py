"""What a comparison has found, and how it is printed."""

import dataclasses
import math
from dataclasses import dataclass
from io import StringIO
from typing import TYPE_CHECKING, Any

from sglite.tools.compare.divergence import Divergence, PartResult
from sglite.tools.compare.itself import SelfResult
from sglite.tools.compare.layers import LayerResult
from sglite.tools.compare.limits import Limits
from sglite.tools.compare.measuring import LogitsResult
from sglite.tools.compare.routing import RoutingResult
from sglite.tools.compare.texts import TextResult
from sglite.tools.quantization_loss import QuantizationLoss

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.table import Table

_WIDTH = 132  # of the text; a terminal has its own


@dataclass(frozen=True, slots=True)
class ComparisonReport:
    """What `sglite.compare` gives: true if the model is right. Prints as tables.

    Attributes:
        model: how it is called, with its class, dtype and device.
        reference: the class that it was compared with.
        limits: that were kept to, with their reason, for each dtype that it was run in.
        logits: teacher-forced, per phase and prompt, and per phase over all.
        texts: generated greedily.
        routing: where mixtures of experts send their tokens.
        layers: outputs of all decoder layers, in order.
        parts: where something diverges, the modules that were looked at.
        itself: sglite against itself.
        quantization: what quantised weights lose, where that was asked for.
        first_divergence: where the model first goes wrong; None where it does not.
    """

    model: str
    reference: str
    limits: list[Limits]
    logits: list[LogitsResult]
    texts: list[TextResult]
    routing: list[RoutingResult]
    layers: list[LayerResult]
    parts: list[PartResult]
    itself: list[SelfResult]
    quantization: QuantizationLoss | None
    first_divergence: Divergence | None

    @property
    def passed(self) -> bool:
        """Whether everything is within its limits."""
        return self.first_divergence is None

    def __bool__(self) -> bool:
        return self.passed

    @property
    def verdict(self) -> str:
        """One line: that it passed, or the first divergence; and what could not be looked at."""
        text = f"passed: {self.model} agrees with {self.reference}"
        if not self.passed:
            text = f"failed: {self.first_divergence}"
        unmet = ", ".join(f"{row.condition} ({row.note})" for row in self.itself if not row.is_met)
        return f"{text}; not compared with itself under: {unmet}" if unmet else text

    def to_dict(self) -> dict[str, Any]:
        """Everything, of plain types that JSON has; infinite values as strings."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        rows = {name: _plain(value) for name, value in values.items()}
        first = self.first_divergence
        return {
            "passed": self.passed,
            **rows,
            "first_divergence": None if first is None else {**_plain(first), "text": str(first)},
            "itself": [{**_plain(row), "passed": row.passed} for row in self.itself],
        }

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> "RenderResult":
        from rich.text import Text

        yield Text(f"{self.model} against {self.reference}", style="bold")
        for limits in self.limits:
            yield self._logits_table(limits.dtype)
        yield self._texts_table()
        if self.routing:
            yield self._routing_table()
        for limits in self.limits:
            yield self._layers_table(limits.dtype)
        if self.parts:
            yield self._parts_table()
        if self.itself:
            yield self._self_table()
        if self.quantization is not None:
            yield Text(str(self.quantization))
        for limits in self.limits:
            yield Text(f"Limits for {limits.dtype}: {_limits_text(limits)}")

    def __str__(self) -> str:
        from rich.console import Console

        text = StringIO()
        Console(file=text, width=_WIDTH).print(self)
        return text.getvalue() + self.verdict

    __repr__ = __str__

    def _logits_table(self, dtype: str) -> "Table":
        table = _table(
            f"Logits in {dtype}, teacher-forced",
            ["", "prompt", "rows", "top-5 off", "rms", "KL", "KL back", "top-5", "greedy", "rel."],
        )
        for row in self.logits:
            if row.dtype != dtype:
                continue
            found = row.found
            table.add_row(
                row.phase,
                "all" if row.prompt_tokens is None else str(row.prompt_tokens),
                str(found.positions),
                *_numbers(found.largest, found.rms, found.kl, found.reverse_kl),
                f"{found.top:.1%}",
                f"{found.greedy:.1%}",
                _number(found.relative_error),
                style="bold red" if row.failure else "bold" if row.prompt_tokens is None else "",
            )
            if row.own is not None and row.prompt_tokens is None:
                own = row.own
                table.add_row(
                    "",
                    f"Hugging Face {dtype}",
                    str(own.positions),
                    *_numbers(own.largest, own.rms, own.kl, own.reverse_kl),
                    f"{own.top:.1%}",
                    f"{own.greedy:.1%}",
                    _number(own.relative_error),
                    style="dim",
                )
        return table

    def _texts_table(self) -> "Table":
        table = _table("Greedy texts", ["prompt", "same tokens", "ROUGE-L", "gap where they part"])
        for row in self.texts:
            table.add_row(
                str(row.prompt_tokens),
                f"{row.same_tokens} of {len(row.ours)}",
                f"{row.rouge_l:.3f}",
                "" if row.gap is None else f"{row.gap:.2g}",
                style="" if row.passed else "bold red",
            )
        return table

    def _routing_table(self) -> "Table":
        table = _table(
            "Experts chosen, against Hugging Face's in float32",
            ["", "dtype", "tokens", "near ties (computed with Hugging Face's)", "others"],
        )
        for row in self.routing:
            table.add_row(
                row.path,
                row.dtype,
                str(row.tokens),
                str(row.ties),
                str(row.others),
                style="bold red" if row.others else "",
            )
        return table

    def _layers_table(self, dtype: str) -> "Table":
        table = _table(
            f"Layers in {dtype}",
            ["", "rel. error", "mean", "cosine", "allowed", "Hugging Face's own"],
        )
        for row in self.layers:
            if row.dtype != dtype:
                continue
            table.add_row(
                row.path,
                *_numbers(row.relative_error, row.mean_error),
                f"{row.cosine:.7f}",
                _number(row.allowed),
                "" if row.own_error is None else _number(row.own_error),
                style="" if row.passed else "bold red",
            )
        return table

    def _parts_table(self) -> "Table":
        table = _table("Parts", ["", "rel. error", "cosine", "of the input"])
        first = self.first_divergence.path if self.first_divergence else None
        for row in self.parts:
            cosine = "" if row.cosine is None else f"{row.cosine:.7f}"
            error, given = (
                "" if value is None else _number(value)
                for value in (row.relative_error, row.input_error)
            )
            style = "bold red" if row.path == first else ""
            table.add_row(row.path or "(the model)", error, cosine, given, style=style)
        return table

    def _self_table(self) -> "Table":
        table = _table("With itself", ["", "rows", "rows differ", "largest", "same bits", ""])
        for row in self.itself:
            table.add_row(
                row.condition,
                str(row.rows),
                str(row.differing_rows),
                _number(row.largest_difference),
                "promised" if row.is_promised else "not promised",
                row.note if row.is_met else f"not met: {row.note}",
                style="bold red" if not row.passed else "" if row.is_met else "yellow",
            )
        return table


def _limits_text(limits: Limits) -> str:
    kind = "relative" if limits.is_relative else "top-5 log-probabilities"
    return f"{limits.prefill:g} on prefill, {limits.decode:g} on decode ({kind}): {limits.reason}"


def _table(title: str, columns: list[str]) -> "Table":
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column(columns[0], no_wrap=True)
    for name in columns[1:]:
        table.add_column(name, justify="right")
    return table


def _number(value: float) -> str:
    return f"{value:.1e}" if value else "0"


def _numbers(*values: float) -> list[str]:
    return [_number(value) for value in values]


def _plain(value: Any) -> Any:
    """Dataclasses as dicts, and numbers that JSON does not have as strings."""
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
