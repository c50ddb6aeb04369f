"""From logits to token ids and log-probabilities, each request by its own parameters."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Protocol
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from sglite import ops
from sglite.engine.drawn_tokens import DrawnTokens
from sglite.engine.logits_processors import apply_processors
from sglite.engine.sampling_state import (
    SamplingRequest,
    SamplingState,
    parameters,
    token_edits,
)
from sglite.engine.transfer import Download, upload
from sglite.interface.errors import RequestError
from sglite.interface.outputs import Logprob, TokenLogprobs

_NO_FAILURES: Mapping[int, RequestError] = MappingProxyType({})


class TokenTexts(Protocol):
    """The part of `sglite.engine.tokenizer.Tokenizer` that log-probabilities need."""

    def decode_one(self, token_id: int) -> str:
        """Text of a single token, special or not."""


class Sampler:
    """Chooses the next token of each request of a step, in one call of `sglite.ops.sample`.

    Logits processors come first, on a copy of the logits. What goes wrong with a row (a processor,
    NaN, nothing left to choose from) is that request's error alone.

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
        self._workspace_for = (0, 0)

    def draw(
        self,
        logits: Tensor,
        requests: Sequence[SamplingRequest],
        output_indices: Sequence[int],
    ) -> DrawnTokens:
        """Draws one token for each request, without waiting for a GPU.

        Args:
            logits: [R, vocab], row i for `requests[i]`; not changed. Other dtypes than float32 are
                converted.
            requests: R requests. Where one needs its tokens so far, they are known to it.
            output_indices: for each request which of its output tokens this is, from 0 on.
        """
        logits = kernel_rows(logits)
        states = self.states(requests, logits.shape[1])
        processed, failures = apply_processors(logits, states)
        arrays = [*parameters(states, output_indices), *(token_edits(states) or ())]
        reals, integers, *edits = upload(arrays, logits.device)
        token_ids, status = ops.sample(
            processed,
            reals,
            integers,
            edits=ops.TokenEdits(*edits) if edits else None,
            workspace=self.workspace(logits),
        )
        return self.follow(logits, states, token_ids, status, output_indices, failures)

    def follow(
        self,
        logits: Tensor,
        states: Sequence[SamplingState],
        token_ids: Tensor,
        status: Tensor,
        output_indices: Sequence[int],
        failures: Mapping[int, RequestError] = _NO_FAILURES,
        rows: Sequence[int] | None = None,
    ) -> DrawnTokens:
        """Takes tokens on that have been drawn already: their log-probabilities, the way back.

        Args:
            logits: [R, vocab] float32, as the model gave them.
            states: of the R requests.
            token_ids, status: what `sglite.ops.sample` gave.
            output_indices: as in `draw`.
            failures: by row, of the requests whose logits processors failed.
            rows: `rows_with_logprobs(states)`, where the caller has them.
        """
        rows = rows_with_logprobs(states) if rows is None else rows
        logprobs = None
        if rows:
            wanted = [states[index].logprobs for index in rows]
            (row_tensor,) = upload([np.array(rows, np.int64)], logits.device)
            # Rows that failed have no token; what is computed for them is not looked at.
            chosen = token_ids[row_tensor].clamp(min=0)
            logprobs = ops.log_probs(
                logits, chosen, max(wanted), rows=row_tensor, workspace=self.workspace(logits)
            )
        return DrawnTokens(
            states,
            token_ids,
            status,
            output_indices,
            failures,
            rows,
            logprobs,
            self.describe,
        )

    def score(
        self, logits: Tensor, token_ids: Sequence[int] | np.ndarray, top_n: int
    ) -> list[TokenLogprobs]:
        """Log-probabilities of given tokens, as of a prompt's.

        Args:
            logits: [R, vocab]; row i is the model's prediction of `token_ids[i]`.
            token_ids: R ids.
            top_n: how many of the most probable tokens are reported beside the given ones.
        """
        logits = kernel_rows(logits)
        ids = np.asarray(token_ids, np.int64)
        (tensor,) = upload([ids], logits.device)
        found = ops.log_probs(logits, tensor, top_n, workspace=self.workspace(logits))
        return self.describe(ids.tolist(), Download(found).wait(), [top_n] * len(ids))

    def states(self, requests: Sequence[SamplingRequest], vocab_size: int) -> list[SamplingState]:
        """What is kept for each request, made where it is new."""
        found = []
        for request in requests:
            state = self._states.get(request)
            if state is None:
                state = self._states[request] = SamplingState(request, vocab_size)
            found.append(state)
        return found

    def describe(
        self, token_ids: Sequence[int], found: Sequence[Tensor], wanted: Sequence[int]
    ) -> list[TokenLogprobs]:
        """What callers get of `sglite.ops.LogProbs` (on the host): one dict for each token.

        Args:
            token_ids: R ids.
            found: the fields of `LogProbs` for R rows.
            wanted: for each row how many of the most probable tokens are reported.
        """
        result = []
        for token_id, logprob, rank, top_ids, top_logprobs, count in zip(
            token_ids, *(tensor.tolist() for tensor in found), wanted, strict=True
        ):
            entry = {token_id: Logprob(logprob, rank, self._text(token_id))}
            for place in range(count):
                top_id = top_ids[place]
                entry[top_id] = Logprob(top_logprobs[place], place + 1, self._text(top_id))
            result.append(entry)
        return result

    def workspace(self, logits: Tensor) -> Tensor:
        """Scratch memory for `sglite.ops.sample` on these logits, kept from step to step."""
        rows, vocab_size = logits.shape
        made_for_vocab, made_for_rows = self._workspace_for
        if vocab_size != made_for_vocab or rows > made_for_rows:
            self._workspace = ops.sampling_workspace(vocab_size, rows, device=logits.device)
            self._workspace_for = (vocab_size, rows)
        return self._workspace

    def _text(self, token_id: int) -> str:
        text = self._texts.get(token_id)
        if text is None:
            text = self._texts[token_id] = self._tokenizer.decode_one(token_id)
        return text


def rows_with_logprobs(states: Sequence[SamplingState]) -> list[int]:
    """Which of the requests want log-probabilities."""
    return [index for index, state in enumerate(states) if state.logprobs is not None]


def kernel_rows(logits: Tensor) -> Tensor:
    """Float32 logits whose elements lie side by side within each row."""
    if logits.dtype != torch.float32:
        logits = logits.float()
    return logits if logits.stride(1) == 1 else logits.contiguous()
