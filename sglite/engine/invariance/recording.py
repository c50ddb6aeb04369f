"""Takes the logits out of an engine's steps and compares them with those of the prompt alone."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from sglite.engine.batch import LogitsRows
from sglite.engine.invariance.report import Condition, Difference
from sglite.engine.model_runner import ModelRunner
from sglite.engine.request import Request


class Reference:
    """The rows of logits that each position of each prompt has when it is computed alone."""

    def __init__(self):
        self._rows: dict[tuple[int, int], Tensor] = {}

    def get(self, prompt: int, position: int) -> Tensor | None:
        """float32[vocabulary]; None where nothing was kept."""
        return self._rows.get((prompt, position))

    def keep(self, prompt: int, position: int, row: Tensor) -> None:
        """Keeps a row for the comparisons to come."""
        self._rows[prompt, position] = row.clone()


class Comparison:
    """Counts what differs from the reference under one condition.

    Args:
        name: of the condition.
        reference: what to compare with. Rows that it does not hold are not compared.
        keeps: whether such rows become part of it.
    """

    def __init__(self, name: str, reference: Reference, *, keeps: bool = False):
        self.name = name
        self._reference = reference
        self._keeps = keeps
        self._rows = self._logits = 0
        self._differing_rows = self._differing_logits = self._differing_bits = 0
        self._largest = 0.0
        self._first: Difference | None = None

    def take(self, prompt: int, first_position: int, logits: Tensor) -> None:
        """Compares logits [n, vocabulary] of the positions from `first_position` on."""
        for position, row in enumerate(logits.float().cpu(), first_position):
            expected = self._reference.get(prompt, position)
            if expected is not None:
                self._compare(prompt, position, row, expected)
            elif self._keeps:
                self._reference.keep(prompt, position, row)

    def _compare(self, prompt: int, position: int, row: Tensor, expected: Tensor) -> None:
        self._rows += 1
        self._logits += len(row)
        found_bits, expected_bits = (t.contiguous().view(torch.int32) for t in (row, expected))
        if torch.equal(found_bits, expected_bits):
            return
        bits = (found_bits ^ expected_bits).numpy()
        (places,) = np.nonzero(bits)
        self._differing_rows += 1
        self._differing_logits += len(places)
        self._differing_bits += int(np.unpackbits(bits.view(np.uint8)).sum())
        largest = float((row - expected)[places].abs().max())
        if not largest <= self._largest:  # a NaN is the largest of all
            self._largest = largest
        if self._first is None:
            token_id = int(places[0])
            self._first = Difference(
                self.name,
                prompt,
                position,
                token_id,
                float(expected[token_id]),
                float(row[token_id]),
            )

    def result(self, note: str, is_met: bool) -> Condition:
        """What was found so far."""
        return Condition(
            self.name,
            rows=self._rows,
            logits=self._logits,
            differing_rows=self._differing_rows,
            differing_logits=self._differing_logits,
            differing_bits=self._differing_bits,
            largest_difference=self._largest,
            first=self._first,
            note=note,
            is_met=is_met,
        )


class Recorder:
    """A request's logits processor: hands its logits on, and decides what is generated.

    Args:
        comparison: where the logits go.
        prompt: which prompt the request is of.
        num_prompt_tokens: of the request.
        forced: what is to be generated, whatever the logits say; None: what they say.
    """

    def __init__(
        self,
        comparison: Comparison,
        prompt: int,
        num_prompt_tokens: int,
        forced: Sequence[int] | None,
    ):
        self._comparison = comparison
        self._prompt = prompt
        self._num_prompt_tokens = num_prompt_tokens
        self._forced = forced

    def __call__(self, token_ids: list[int], logits: Tensor) -> Tensor:
        """Takes the row behind the last of prompt and `token_ids`."""
        position = self._num_prompt_tokens + len(token_ids) - 1
        self._comparison.take(self._prompt, position, logits[None])
        if self._forced is not None:
            logits.fill_(-torch.inf)
            logits[self._forced[len(token_ids)]] = 0.0
        return logits

    def take_prompt(self, first_position: int, logits: Tensor) -> None:
        """Takes the rows of a chunk of the request's prompt."""
        self._comparison.take(self._prompt, first_position, logits)


class RecordingRunner(ModelRunner):
    """Gives the logits of prompts to the requests' recorders, in place of log-probabilities."""

    def score_prompt(self, request: Request, row: LogitsRows, logits: Tensor) -> list:
        """Nothing for each of the rows, which is what the request then counts."""
        (recorder,) = request.params.logits_processors
        rows = logits[row.first_prompt_row : row.first_prompt_row + row.num_prompt_rows]
        # The row of position p scores the token at p + 1.
        recorder.take_prompt(row.first_prompt_position - 1, rows)
        return [None] * row.num_prompt_rows
