"""Decode steps on the CPU, which mostly follow each other with the same requests."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from sglite.engine.decode_runner import DecodeRunner
from sglite.engine.decode_state import DecodeRows
from sglite.engine.drawn_tokens import DrawnTokens
from sglite.engine.request import Request
from sglite.engine.sampler import rows_with_logprobs
from sglite.engine.sampling_state import SamplingState
from sglite.engine.scheduler import Step


class DecodeSteps(DecodeRunner):
    """Runs steps in which every request gets its next token, without laying them out anew.

    A step's weights have pushed all else out of the processor's caches, so that what the host does
    for a step costs by what it touches. Here that is one `DecodeState`, moved on in one call, and
    tensors that stay the same for as long as the batch has its size.

    Args: as of `DecodeRunner`.
    """

    def __init__(self, *arguments: Any, **limits: int):
        super().__init__(*arguments, **limits)
        self._state = self._make_state()
        self._rows: DecodeRows | None = None
        self._num_rows = 0
        # The requests asked about last, how they sample, and whether all do without the host.
        self._requests: list[Request] = []
        self._prompt_lengths: list[int] = []
        self._sampling: list[SamplingState] = []
        self._logprob_rows: list[int] = []
        self._are_plain = True

    def takes(self, step: Step) -> bool:
        """As `DecodeRunner` has it."""
        if not step.only_decodes:
            return False
        requests = [item.request for item in step.items]
        if requests != self._requests:
            self._requests = requests
            self._prompt_lengths = [request.num_prompt_tokens for request in requests]
            self._sampling = self._sampler.states(requests, self._vocab_size)
            self._logprob_rows = rows_with_logprobs(self._sampling)
            self._are_plain = not any(
                state.has_edits or state.processors for state in self._sampling
            )
        return self._are_plain

    def launch(self, step: Step, drawn: Tensor | None, sources: Sequence[int]) -> DrawnTokens:
        """As `DecodeRunner` has it; the step is computed when this returns."""
        items, state = step.items, self._state
        state.set(items, self._sampling, drawn, sources)
        if self._num_rows != len(items):
            self._num_rows = len(items)
            self._rows = state.rows(len(items), self._pool.layers, self._spare_memory)
        rows = self._rows
        # Before the step, whose weights push the requests out of the processor's caches.
        indices = [
            item.stop - length for item, length in zip(items, self._prompt_lengths, strict=True)
        ]
        logits = state.step(self._model, rows, self._sampler.workspace)
        return self._sampler.follow(
            logits,
            self._sampling,
            rows.token_ids,
            rows.status,
            indices,
            rows=self._logprob_rows,
        )

    def rest(self) -> None:
        """As `DecodeRunner` has it."""
        self._requests, self._sampling = [], []
        self._rows, self._num_rows = None, 0  # whose batch knows the layers that it went through
        self._state.forget()

    def close(self) -> None:
        """As `DecodeRunner` has it."""
        self._model = self._state = self._rows = None
        self._requests, self._sampling = [], []
