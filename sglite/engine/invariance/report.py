"""What a check of invariance has found, and how it is printed."""

from collections.abc import Sequence
from dataclasses import dataclass
from io import StringIO
from typing import TYPE_CHECKING

# rich is imported where something is printed: `LLM` is to be ready quickly.
if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

_WIDTH = 140  # of the text; a terminal has its own


@dataclass(frozen=True, slots=True)
class Difference:
    """The first logit found that has other bits than the prompt alone gave it.

    Attributes:
        condition: the name of the condition under which it was found.
        prompt: the prompt's place in the list.
        position: the token's place in the prompt and what follows it, from 0 on; the logit is one
            for the token behind it.
        token_id: which of the logits.
        expected: its value for the prompt alone.
        found: its value under the condition.
    """

    condition: str
    prompt: int
    position: int
    token_id: int
    expected: float
    found: float

    def __str__(self) -> str:
        return (
            f"{self.condition}: prompt {self.prompt}, position {self.position}, the logit of token "
            f"{self.token_id} is {self.found!r} instead of {self.expected!r}"
        )


@dataclass(frozen=True, slots=True)
class Condition:
    """One way of computing the prompts, and how its logits compare.

    Attributes:
        name: such as "batch of 17".
        rows: rows of logits that were compared; each row belongs to one position of one prompt.
        logits: logits that were compared.
        differing_rows, differing_logits, differing_bits: how many are not the same.
        largest_difference: between two logits, in absolute value; NaN where one of them is.
        first: the first difference, in the order of computing; None if there is none.
        note: what shows that the condition was met, such as "9 preemptions"; or why it was not.
        is_met: whether it was.
    """

    name: str
    rows: int
    logits: int
    differing_rows: int = 0
    differing_logits: int = 0
    differing_bits: int = 0
    largest_difference: float = 0.0
    first: Difference | None = None
    note: str = ""
    is_met: bool = True

    @property
    def ok(self) -> bool:
        """Whether no bit differs."""
        return self.differing_bits == 0


@dataclass(frozen=True, slots=True)
class InvarianceReport:
    """What `LLM.check_invariance` gives: true if no bit differs. Prints as a table.

    Not every condition can be met with every model, prompt and machine: see `is_complete`.

    Attributes:
        model: how the configuration calls the model, with dtype and device.
        is_promised: whether the configuration promises the same bits (`config.batch_invariant`).
        conditions: in the order in which they were computed.
    """

    model: str
    is_promised: bool
    conditions: Sequence[Condition]

    @property
    def ok(self) -> bool:
        """Whether no bit differs under any condition."""
        return all(condition.ok for condition in self.conditions)

    def __bool__(self) -> bool:
        return self.ok

    @property
    def is_complete(self) -> bool:
        """Whether every condition was met; otherwise `ok` says nothing of some of them."""
        return not self.unmet

    @property
    def unmet(self) -> list[Condition]:
        """The conditions that were not met, each with its reason."""
        return [condition for condition in self.conditions if not condition.is_met]

    @property
    def first_difference(self) -> Difference | None:
        """The first difference of the first condition that has one."""
        found = (condition.first for condition in self.conditions if condition.first)
        return next(found, None)

    @property
    def logits(self) -> int:
        """Logits that were compared."""
        return sum(condition.logits for condition in self.conditions)

    @property
    def differing_bits(self) -> int:
        """Bits that differ, over all conditions."""
        return sum(condition.differing_bits for condition in self.conditions)

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> "RenderResult":
        from rich.table import Table
        from rich.text import Text

        table = Table(title=f"Invariance of {self.model}", title_justify="left")
        table.add_column("condition", no_wrap=True)
        for name in ("rows", "logits", "rows differ", "bits differ", "largest"):
            table.add_column(name, justify="right")
        table.add_column("")
        for condition in self.conditions:
            style = "bold red" if not condition.ok else "" if condition.is_met else "yellow"
            table.add_row(*_cells(condition), style=style)
        yield table
        yield from (Text(line) for line in self._verdict())

    def _verdict(self) -> list[str]:
        if self.ok:
            lines = [f"All {self.logits:,} logits compared are the same bits."]
        else:
            lines = [
                f"{self.differing_bits:,} bits of {self.logits:,} logits differ. The first of "
                f"each condition:",
                *(f"  {condition.first}" for condition in self.conditions if condition.first),
            ]
        if not self.is_complete:
            lines += [
                f"The check is not complete: {len(self.unmet)} of {len(self.conditions)} "
                f"conditions were not met.",
                *(f"  {condition.name}: {condition.note}" for condition in self.unmet),
            ]
        if not self.is_promised:
            lines.append(
                "batch_invariant is off, so this configuration does not promise the same bits: "
                "LLM(..., batch_invariant=True) does."
            )
        return lines

    def __str__(self) -> str:
        from rich.console import Console

        text = StringIO()
        Console(file=text, width=_WIDTH).print(self)
        return text.getvalue().rstrip("\n")

    __repr__ = __str__


def _cells(condition: Condition) -> list[str]:
    note = condition.note if condition.is_met else f"not met: {condition.note}"
    if not condition.rows:
        return [condition.name, "-", "-", "-", "-", "-", note]
    largest = "0" if condition.ok else f"{condition.largest_difference:.1e}"
    return [
        condition.name,
        f"{condition.rows:,}",
        f"{condition.logits:,}",
        f"{condition.differing_rows:,}",
        f"{condition.differing_bits:,}",
        largest,
        note,
    ]
