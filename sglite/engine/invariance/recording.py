"""Takes the logits out of an engine's steps and compares them with those of the prompt alone."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from sglite.engine.batch import LogitsRows
from sglite.engine.drawn_tokens import DrawnTokens
from sglite.engine.invariance.report import Condition, Difference
from sglite.engine.model_runner import ModelRunner
from sglite.engine.request import Request
from sglite.engine.sampler import Sampler, TokenTexts
from sglite.engine.sampling_state import SamplingState
from sglite.engine.scheduler import Step


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


class LogitsRecorder:
    """Hands a request's logits on, and as its logits processor decides what is generated.

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
        self.take_output(len(token_ids), logits)
        if self._forced is not None:
            logits.fill_(-torch.inf)
            logits[self._forced[len(token_ids)]] = 0.0
        return logits

    def take_output(self, index: int, row: Tensor) -> None:
        """Takes the row [vocabulary] from which the output token `index` is drawn."""
        self._comparison.take(self._prompt, self._num_prompt_tokens + index - 1, row[None])

    def take_prompt(self, first_position: int, logits: Tensor) -> None:
        """Takes the rows of a chunk of the request's prompt."""
        self._comparison.take(self._prompt, first_position, logits)


#: Of requests that have no logits processor, and whose tokens are what the logits say.
Recorders = Mapping[Request, LogitsRecorder]
_NONE: Recorders = MappingProxyType({})


class RecordingSampler(Sampler):
    """Gives the logits that requests without a logits processor sample from to their recorders.

    Args:
        tokenizer: as the sampler's.
        recorders: of these requests.
    """

    def __init__(self, tokenizer: TokenTexts, recorders: Recorders):
        super().__init__(tokenizer)
        self._recorders = recorders
        self._of_states: WeakKeyDictionary[SamplingState, LogitsRecorder] = WeakKeyDictionary()

    def states(self, requests: Sequence[Request], vocab_size: int) -> list[SamplingState]:
        """As the sampler's."""
        states = super().states(requests, vocab_size)
        for request, state in zip(requests, states, strict=True):
            if request in self._recorders:
                self._of_states[state] = self._recorders[request]
        return states

    def follow(
        self,
        logits: Tensor,
        states: Sequence[SamplingState],
        token_ids: Tensor,
        status: Tensor,
        output_indices: Sequence[int],
        *others: Any,
        **further: Any,
    ) -> DrawnTokens:
        """As the sampler's: whatever has drawn, its tokens come through here with their logits."""
        for row, state, index in zip(logits, states, output_indices, strict=True):
            if state in self._of_states:
                self._of_states[state].take_output(index, row)
        return super().follow(logits, states, token_ids, status, output_indices, *others, **further)


class RecordingRunner(ModelRunner):
    """Gives logits to recorders: those of prompts in place of log-probabilities.

    Args:
        *arguments: as the model runner's.
        recorders: of the requests without a logits processor; that of any other is its only one.

    Attributes:
        num_kept_steps: decode steps whose rows were moved on, and not laid out anew.
    """

    def __init__(self, *arguments: Any, recorders: Recorders = _NONE):
        self._recorders = recorders
        super().__init__(*arguments)
        self.num_kept_steps = 0

    def make_sampler(self, tokenizer: TokenTexts) -> Sampler:
        """One that records."""
        return RecordingSampler(tokenizer, self._recorders)

    def launch_decode(self, step: Step) -> DrawnTokens | None:
        """As the model runner's; counts them."""
        drawn = super().launch_decode(step)
        self.num_kept_steps += drawn is not None
        return drawn

    def score_prompt(self, request: Request, row: LogitsRows, logits: Tensor) -> list:
        """Nothing for each of the rows, which is what the request then counts."""
        (recorder,) = request.params.logits_processors
        rows = logits[row.first_prompt_row : row.first_prompt_row + row.num_prompt_rows]
        # The row of position p scores the token at p + 1.
        recorder.take_prompt(row.first_prompt_position - 1, rows)
        return [None] * row.num_prompt_rows
