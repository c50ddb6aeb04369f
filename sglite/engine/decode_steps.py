"""Decode steps on the CPU, which mostly follow each other with the same requests."""

from collections.abc import Sequence

from torch import Tensor, nn

from sglite.cache.kv_pool import KVPool
from sglite.engine.decode_state import DecodeRows, DecodeState
from sglite.engine.drawn_tokens import DrawnTokens
from sglite.engine.request import Request
from sglite.engine.sampler import Sampler, rows_with_logprobs
from sglite.engine.sampling_state import SamplingState
from sglite.engine.scheduler import Step


class DecodeSteps:
    """Runs steps in which every request gets its next token, without laying them out anew.

    A step's weights have pushed all else out of the processor's caches, so that what the host does
    for a step costs by what it touches. Here that is one `DecodeState`, moved on in one call, and
    tensors that stay the same for as long as the batch has its size.

    Args:
        model, pool, sampler: as the model runner's.
        vocab_size: width of the logits.
        max_requests: requests of a step at most.
        max_tokens: positions of a request at most.
    """

    def __init__(
        self,
        model: nn.Module,
        pool: KVPool,
        sampler: Sampler,
        *,
        vocab_size: int,
        max_requests: int,
        max_tokens: int,
    ):
        self._model = model
        self._pool = pool
        self._sampler = sampler
        self._vocab_size = vocab_size
        self._state = DecodeState(
            max_requests,
            -(-max_tokens // pool.page_size),
            pool,
            has_mrope=getattr(model, "has_mrope", False),
        )
        self._rows: DecodeRows | None = None
        self._num_rows = 0
        # The requests asked about last, how they sample, and whether all do without the host.
        self._requests: list[Request] = []
        self._prompt_lengths: list[int] = []
        self._sampling: list[SamplingState] = []
        self._logprob_rows: list[int] = []
        self._are_plain = True

    def takes(self, step: Step) -> bool:
        """Whether `launch` can run this step; asked right before."""
        # The position before is where the state starts from; position 0 has none.
        if not step.only_decodes:
            return False
        requests = [item.request for item in step.items]
        if requests != self._requests:
            self._requests = requests
            self._prompt_lengths = [request.num_prompt_tokens for request in requests]
            self._sampling = self._sampler.states(requests, self._vocab_size)
            self._logprob_rows = rows_with_logprobs(self._sampling)
            self._are_plain = not (
                any(state.has_edits or state.processors for state in self._sampling)
                or any(request.wants_prompt_logprobs for request in requests)
            )
        return self._are_plain

    def launch(self, step: Step, drawn: Tensor | None, sources: Sequence[int]) -> DrawnTokens:
        """Runs a step that `takes` has agreed to; arguments as of `DecodeGraphs.launch`."""
        items, state = step.items, self._state
        state.set(items, self._sampling, drawn, sources)
        if self._num_rows != len(items):
            self._num_rows = len(items)
            self._rows = state.rows(len(items), self._pool.layers)
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
        """Forgets the requests of the last step."""
        self._requests, self._sampling = [], []
        self._state.forget()

    def close(self) -> None:
        """Drops the model and the requests."""
        self._model = self._state = self._rows = None
        self._requests, self._sampling = [], []
