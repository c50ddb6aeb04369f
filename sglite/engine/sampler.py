"""From logits to token ids and log-probabilities, each request by its own parameters."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from sglite import ops
from sglite.engine.sampling_state import SamplingRequest, SamplingState, token_edits
from sglite.interface.errors import RequestError
from sglite.interface.outputs import Logprob, TokenLogprobs
from sglite.ops.sampling import NOT_A_NUMBER, NOTHING_LEFT, SAMPLED


class TokenTexts(Protocol):
    """The part of `sglite.engine.tokenizer.Tokenizer` that log-probabilities need."""

    def decode_one(self, token_id: int) -> str:
        """Text of a single token, special or not."""


class Sampled(NamedTuple):
    """What sampling gave one request."""

    token_id: int | None  # None if there is an error
    logprobs: TokenLogprobs | None  # None if not asked for
    error: RequestError | None


class Sampler:
    """Chooses the next token of each request of a step, in one call of `sglite.ops.sample`.

    Logits processors come first, each on a copy of its request's row. What goes wrong with a row
    (a processor, NaN, nothing left to choose from) is that request's error alone.

    What a request needs from step to step (counts for penalties, say) is kept for as long as the
    request itself lives. Used by one thread at a time.

    Args:
        tokenizer: for the text of log-probabilities.
    """

    def __init__(self, tokenizer: TokenTexts):
        self._tokenizer = tokenizer
        self._texts: dict[int, str] = {}
        self._states: WeakKeyDictionary[SamplingRequest, SamplingState] = WeakKeyDictionary()
        self._workspace = torch.empty(0, dtype=torch.uint8)
        self._workspace_vocab = 0

    def sample(self, logits: Tensor, requests: Sequence[SamplingRequest]) -> list[Sampled]:
        """Draws one token for each request.

        Args:
            logits: [R, vocab], row i for `requests[i]`; not changed. Other dtypes than float32 are
                converted.
            requests: R requests, whose tokens so far are known to them.

        Returns:
            One `Sampled` for each request, in order.
        """
        if not requests:
            return []
        logits = _kernel_rows(logits)
        states = [self._state(request, logits.shape[1]) for request in requests]
        if any(state.processors for state in states):
            drawn = self._draw_processed(logits, states)
        else:
            drawn = self._draw(logits, states)
        logprobs = self._chosen_logprobs(logits, states, drawn)
        return [
            Sampled(None, None, result)
            if isinstance(result, RequestError)
            else Sampled(result, logprobs.get(index), None)
            for index, result in enumerate(drawn)
        ]

    def score(
        self, logits: Tensor, token_ids: Sequence[int] | np.ndarray, top_n: int
    ) -> list[TokenLogprobs]:
        """Log-probabilities of given tokens, as of a prompt's.

        Args:
            logits: [R, vocab]; row i is the model's prediction of `token_ids[i]`.
            token_ids: R ids.
            top_n: how many of the most probable tokens are reported beside the given ones.
        """
        logits = _kernel_rows(logits)
        wanted = [top_n] * len(token_ids)
        return self._logprobs(logits, np.asarray(token_ids, np.int64), wanted, None)

    def _state(self, request: SamplingRequest, vocab_size: int) -> SamplingState:
        state = self._states.get(request)
        if state is None:
            state = self._states[request] = SamplingState(request, vocab_size)
        return state

    def _scratch(self, vocab_size: int) -> Tensor:
        if self._workspace_vocab != vocab_size:
            self._workspace = ops.sampling_workspace(vocab_size)
            self._workspace_vocab = vocab_size
        return self._workspace

    def _draw(
        self, logits: Tensor, states: Sequence[SamplingState], rows: list[int] | None = None
    ) -> list[int | RequestError]:
        """A token or an error for each state; `rows` are its rows of the logits, else all."""
        edits = token_edits(states)
        token_ids, status = ops.sample(
            logits,
            torch.from_numpy(np.stack([state.reals for state in states])),
            torch.from_numpy(np.stack([state.integers() for state in states])),
            edits=None if edits is None else ops.TokenEdits(*map(torch.from_numpy, edits)),
            rows=None if rows is None else torch.tensor(rows),
            workspace=self._scratch(logits.shape[1]),
        )
        return [
            token_id if code == SAMPLED else _no_token(code, state)
            for token_id, code, state in zip(
                token_ids.tolist(), status.tolist(), states, strict=True
            )
        ]

    def _draw_processed(
        self, logits: Tensor, states: Sequence[SamplingState]
    ) -> list[int | RequestError]:
        """As `_draw`, with the logits processors before it."""
        plain = [index for index, state in enumerate(states) if not state.processors]
        processed = [index for index, state in enumerate(states) if state.processors]
        copies = torch.empty(len(processed), logits.shape[1])
        results: list = [None] * len(states)
        for row, index in zip(copies, processed, strict=True):
            row.copy_(logits[index])
            results[index] = _process(row, states[index])
        for source, pairs in (
            (logits, [(index, index) for index in plain]),
            (copies, [(row, index) for row, index in enumerate(processed) if not results[index]]),
        ):
            if pairs:
                rows, indices = zip(*pairs, strict=True)
                drawn = self._draw(source, [states[index] for index in indices], list(rows))
                for index, result in zip(indices, drawn, strict=True):
                    results[index] = result
        return results

    def _chosen_logprobs(
        self, logits: Tensor, states: Sequence[SamplingState], drawn: list[int | RequestError]
    ) -> dict[int, TokenLogprobs]:
        """By row, for the rows that ask for log-probabilities and have a token."""
        rows = [
            index
            for index, state in enumerate(states)
            if state.logprobs is not None and not isinstance(drawn[index], RequestError)
        ]
        if not rows:
            return {}
        chosen = np.array([drawn[index] for index in rows], np.int64)
        wanted = [states[index].logprobs for index in rows]
        return dict(zip(rows, self._logprobs(logits, chosen, wanted, rows), strict=True))

    def _logprobs(
        self, logits: Tensor, token_ids: np.ndarray, wanted: list[int], rows: list[int] | None
    ) -> list[TokenLogprobs]:
        """The log-probabilities of `token_ids` and of the `wanted` most probable tokens."""
        found = ops.log_probs(
            logits,
            torch.from_numpy(token_ids),
            max(wanted, default=0),
            rows=None if rows is None else torch.tensor(rows),
            workspace=self._scratch(logits.shape[1]),
        )
        result = []
        for token_id, logprob, rank, top_ids, top_logprobs, count in zip(
            token_ids.tolist(), *(tensor.tolist() for tensor in found), wanted, strict=True
        ):
            entry = {token_id: Logprob(logprob, rank, self._text(token_id))}
            for place in range(count):
                top_id = top_ids[place]
                entry[top_id] = Logprob(top_logprobs[place], place + 1, self._text(top_id))
            result.append(entry)
        return result

    def _text(self, token_id: int) -> str:
        text = self._texts.get(token_id)
        if text is None:
            text = self._texts[token_id] = self._tokenizer.decode_one(token_id)
        return text


def _kernel_rows(logits: Tensor) -> Tensor:
    """Float32 logits whose elements lie side by side within each row."""
    if logits.dtype != torch.float32:
        logits = logits.float()
    return logits if logits.stride(1) == 1 else logits.contiguous()


def _process(row: Tensor, state: SamplingState) -> RequestError | None:
    """Runs the request's processors on its row, in place; returns what went wrong."""
    for processor in state.processors:
        try:
            result = processor(list(state.output_token_ids), row)
        except Exception as error:
            failure = _failure(
                state,
                f"the logits processor {_name(processor)} raised {type(error).__name__}: {error}",
            )
            failure.__cause__ = error
            return failure
        if not isinstance(result, Tensor):
            got = type(result).__name__
        elif result.dtype != torch.float32 or result.shape != row.shape:
            got = (
                f"a {str(result.dtype).removeprefix('torch.')} tensor of shape {list(result.shape)}"
            )
        else:
            if result is not row:
                row.copy_(result.detach())
            continue
        return _failure(
            state,
            f"the logits processor {_name(processor)} returned {got}; expected the logits, a "
            f"float32 tensor of shape {list(row.shape)}",
        )
    return None


def _name(processor: Callable) -> str:
    return getattr(processor, "__qualname__", None) or type(processor).__qualname__


def _no_token(status: int, state: SamplingState) -> RequestError:
    source = (
        "the logits processors' result holds" if state.processors else "the model's logits hold"
    )
    reasons = {
        NOT_A_NUMBER: f"{source} NaN",
        NOTHING_LEFT: "every token is banned (logits of -infinity, bad_words, allowed_token_ids, "
        "logit_bias, or end tokens before min_new_tokens)",
    }
    return _failure(state, reasons[status])


def _failure(state: SamplingState, reason: str) -> RequestError:
    """An error that names the step: steps count a request's generated tokens, from 1."""
    return RequestError(f"generation step {len(state.output_token_ids) + 1}: {reason}")
