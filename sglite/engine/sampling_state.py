"""What sampling keeps for one running request: compact, and brought up to date as tokens come."""

from collections.abc import Collection, Iterable, Sequence
from typing import Protocol

import numpy as np

from sglite.interface.errors import RequestError
from sglite.interface.sampling_params import SamplingParams
from sglite.ops.sampling import INTEGERS, REALS

_NO_SEEN = np.empty((0, 3), np.int32)
_NO_IDS = np.empty(0, np.int32)
_NO_VALUES = np.empty(0, np.float32)


class StopConditions(Protocol):
    """The part of `sglite.engine.stopping.StopChecker` that sampling reads."""

    @property
    def ending_token_ids(self) -> Collection[int]:
        """The ids that end the sequence, banned until `min_new_tokens` are there."""


class SamplingRequest(Protocol):
    """The part of `sglite.engine.request.Request` that sampling reads.

    Attributes:
        params: resolved, so that nothing that sampling needs is unset.
        seed: key of the random numbers, 64 bits.
        sample_index: which of the prompt's `n` completions this is.
        prompt_token_ids: int64[prompt].
        output_token_ids: what has been generated; the same list for the life of the request.
        banned_sequences: token sequences whose last token may not complete them.
    """

    params: SamplingParams
    seed: int
    sample_index: int
    prompt_token_ids: np.ndarray
    output_token_ids: list[int]
    banned_sequences: Sequence[Sequence[int]]
    stop_checker: StopConditions


class SeenTokens:
    """How often each token stands in the output, and whether it stands in the prompt.

    Args:
        prompt_token_ids: int64[prompt], or empty where only the output counts.
        vocab_size: larger ids (placeholders of images, say) have no logit and are left out.
    """

    def __init__(self, prompt_token_ids: np.ndarray, vocab_size: int):
        ids = np.unique(prompt_token_ids)
        ids = ids[ids < vocab_size]
        self._entries = np.zeros((len(ids) + 16, 3), np.int32)
        self._entries[: len(ids), 0] = ids
        self._entries[: len(ids), 2] = 1
        self._places = dict(zip(ids.tolist(), range(len(ids)), strict=True))
        self._num_counted = 0

    def update(self, output_token_ids: Sequence[int]) -> np.ndarray:
        """Counts what is new in the output; gives int32[tokens, 3]: id, count, in the prompt."""
        for token in output_token_ids[self._num_counted :]:
            place = self._places.setdefault(token, len(self._places))
            if place == len(self._entries):
                self._entries = np.concatenate([self._entries, np.zeros_like(self._entries)])
            self._entries[place, 0] = token
            self._entries[place, 1] += 1
        self._num_counted = len(output_token_ids)
        return self._entries[: len(self._places)]


class SamplingState:
    """One request's rows of the arrays that `sglite.ops.sample` takes.

    Attributes:
        processors: the request's logits processors.
        output_token_ids: what has been generated, the request's own list.
        logprobs: how many of the most probable tokens are reported; None: no log-probabilities.
        reals: float32[6], see `sglite.ops.sampling.REALS`.
        has_edits: whether single logits may have to be changed, now or later.
        allowed_ids: int32; all other tokens are banned, unless it is empty.
    """

    def __init__(self, request: SamplingRequest, vocab_size: int):
        params = request.params
        self.processors = params.logits_processors
        self.logprobs = params.logprobs
        self.output_token_ids = request.output_token_ids
        self.reals = np.array(
            [
                params.temperature,
                params.top_p,
                params.min_p,
                params.repetition_penalty,
                params.frequency_penalty,
                params.presence_penalty,
            ],
            np.float32,
        )
        key = np.array([request.seed], np.uint64).view(np.int64)[0]
        self._integers = np.array([params.top_k, key, request.sample_index, 0], np.int64)

        self._seen = None
        if params.repetition_penalty != 1.0:
            self._seen = SeenTokens(request.prompt_token_ids, vocab_size)
        elif params.frequency_penalty or params.presence_penalty:
            self._seen = SeenTokens(_NO_IDS, vocab_size)
        self.allowed_ids = np.array(params.allowed_token_ids or (), np.int32)

        def with_logit(token_ids: Iterable[int]) -> list[int]:
            return [token for token in token_ids if token < vocab_size]

        self._num_without_end = params.min_new_tokens
        self._endings = with_logit(request.stop_checker.ending_token_ids)
        sequences = [tuple(sequence) for sequence in request.banned_sequences]
        always = with_logit(sequence[0] for sequence in sequences if len(sequence) == 1)
        self._bias_ids = np.array([*params.logit_bias, *always], np.int32)
        self._bias_values = np.array(
            [*params.logit_bias.values(), *[-np.inf] * len(always)], np.float32
        )
        # Banned sequences by their last token but one, (the tokens before the last, the last).
        self._continuations: dict[int, list[tuple[list[int], int]]] = {}
        for *before, last in sequences:
            if before and last < vocab_size:
                self._continuations.setdefault(before[-1], []).append((before, last))
        self.has_edits = bool(
            self._seen
            or len(self.allowed_ids)
            or len(self._bias_ids)
            or self._continuations
            or (self._num_without_end and self._endings)
        )

    def integers(self, output_index: int) -> np.ndarray:
        """int64[4], see `sglite.ops.sampling.INTEGERS`; good until the next call."""
        self._integers[3] = output_index
        return self._integers

    def seen(self) -> np.ndarray:
        """int32[tokens, 3], the tokens that penalties are for; good until the next token."""
        return _NO_SEEN if self._seen is None else self._seen.update(self.output_token_ids)

    def biases(self) -> tuple[np.ndarray, np.ndarray]:
        """int32[tokens] and float32[tokens], what is added to which logits; -inf bans."""
        banned = list(self._endings) if len(self.output_token_ids) < self._num_without_end else []
        if self._continuations and self.output_token_ids:
            for before, last in self._continuations.get(self.output_token_ids[-1], ()):
                if self.output_token_ids[-len(before) :] == before:
                    banned.append(last)
        if not banned:
            return self._bias_ids, self._bias_values
        return (
            np.concatenate([self._bias_ids, np.array(banned, np.int32)]),
            np.concatenate([self._bias_values, np.full(len(banned), -np.inf, np.float32)]),
        )


def parameters(
    states: Sequence[SamplingState], output_indices: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """The `reals` and `integers` of `sglite.ops.sample` for these rows.

    Args:
        states: of R requests.
        output_indices: for each which of its output tokens is drawn, from 0 on.
    """
    if not states:
        return np.empty((0, len(REALS)), np.float32), np.empty((0, len(INTEGERS)), np.int64)
    # An array made of a list of arrays would take ten times as long.
    integers = [state.integers(index) for state, index in zip(states, output_indices, strict=True)]
    return (
        np.concatenate([state.reals for state in states]).reshape(-1, len(REALS)),
        np.concatenate(integers).reshape(-1, len(INTEGERS)),
    )


def token_edits(states: Sequence[SamplingState]) -> tuple[np.ndarray, ...] | None:
    """The fields of `sglite.ops.TokenEdits` for these rows as arrays; None if no row has edits."""
    if not any(state.has_edits for state in states):
        return None
    seen, bias_ids, bias_values, allowed = [], [], [], []
    for state in states:
        ids, values = state.biases() if state.has_edits else (_NO_IDS, _NO_VALUES)
        bias_ids.append(ids)
        bias_values.append(values)
        seen.append(state.seen())
        allowed.append(state.allowed_ids)
    offsets = np.zeros((3, len(states) + 1), np.int64)
    for row, lists in zip(offsets, (seen, bias_ids, allowed), strict=True):
        np.cumsum([len(entries) for entries in lists], out=row[1:])
    return offsets, *map(np.concatenate, (seen, bias_ids, bias_values, allowed))


def step_error(output_index: int, reason: str) -> RequestError:
    """An error that names the step: steps count a request's generated tokens, from 1."""
    return RequestError(f"generation step {output_index + 1}: {reason}")
