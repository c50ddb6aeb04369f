"""One sequence being generated: its tokens, its pages, and how far it has come."""

import enum
import time
from collections.abc import Sequence

import numpy as np

from sglite.engine.failures import failed
from sglite.engine.stopping import StopChecker
from sglite.interface.sampling_params import SamplingParams
from sglite.multimodal.inputs import MultimodalInputs


class RequestState(enum.Enum):
    """Where a request is on its way."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


# A member of an enum is searched for each time: in a step's loops that costs more than the rest.
WAITING, RUNNING, FINISHED = RequestState


class Request:
    """One completion of one prompt; `n` completions are `n` requests that share their prefix.

    Attributes:
        banned_sequences: token sequences whose last token may not complete them.
        max_tokens: of prompt and output together.
        token_ids: int64[max_tokens], prompt and output; the first `num_tokens` are known.
        keys: int64[max_tokens], what the prefix cache knows them by: `token_ids` itself, unless
            there are images.
        multimodal: the images of the prompt; None where there are none.
        num_launched: positions whose key and value are in `pages`, or will be once the steps that
            have been launched are done.
        num_computed: those of them whose step has been committed.
        num_unknown: tokens that launched steps sample and that are not known yet.
        incarnation: how often it has been preempted; tells what a step was launched for.
        needs_commit: whether the next token depends on the tokens before it in more than what the
            model sees, so that a step must not be launched before the last one is committed.
        pages: int32[capacity in pages], the first `num_pages` are held by this request.
        prefix_lock: the prefix cache's hold on what was matched, while running.
        num_cached_tokens: prompt tokens that came out of the cache when it was first admitted.
        output_token_ids: what has been generated, as a list.
        logprobs: one entry per output token, where asked for.
        prompt_logprobs: one entry per prompt position from `prompt_logprobs_start` on.
        called_at: when the call began, before its prompts were read, by `time.perf_counter`.
    """

    # Side by side, as a step reads some of every request after its weights have emptied the caches.
    __slots__ = (
        "__weakref__",
        "_ending_token_ids",
        "_keeps_text",
        "arrival",
        "banned_sequences",
        "called_at",
        "error",
        "finish_reason",
        "finished_at",
        "first_token_at",
        "incarnation",
        "keys",
        "logprobs",
        "max_tokens",
        "multimodal",
        "namespace",
        "needs_commit",
        "num_cached_tokens",
        "num_computed",
        "num_launched",
        "num_pages",
        "num_prompt_tokens",
        "num_tokens",
        "num_unknown",
        "output_token_ids",
        "pages",
        "params",
        "prefix_lock",
        "prompt_logprobs",
        "sample_index",
        "seed",
        "state",
        "stop_checker",
        "stop_reason",
        "token_ids",
    )

    def __init__(
        self,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        seed: int = 0,
        sample_index: int = 0,
        stop_checker: StopChecker | None = None,
        banned_sequences: Sequence[Sequence[int]] = (),
        namespace: str = "",
        multimodal: MultimodalInputs | None = None,
        prompt_keys: Sequence[int] | None = None,
        called_at: float | None = None,
    ):
        self.params = params
        self.seed = seed
        self.sample_index = sample_index
        self.banned_sequences = banned_sequences
        self.namespace = namespace
        self.stop_checker = stop_checker or StopChecker(params)
        # Most tokens are nothing to it, and need not touch it.
        self._keeps_text = self.stop_checker.keeps_text
        self._ending_token_ids = self.stop_checker.ending_token_ids

        self.num_prompt_tokens = len(prompt_token_ids)
        self.num_tokens = self.num_prompt_tokens
        self.max_tokens = self.num_prompt_tokens + params.max_new_tokens
        self.token_ids = np.empty(self.max_tokens, np.int64)
        self.token_ids[: self.num_tokens] = prompt_token_ids
        self.multimodal = multimodal
        self.keys = self.token_ids
        if prompt_keys is not None:
            self.keys = np.empty(self.max_tokens, np.int64)
            self.keys[: self.num_tokens] = prompt_keys
        self.output_token_ids: list[int] = []
        self.logprobs: list = []
        self.prompt_logprobs: list = []

        self.state = WAITING
        self.arrival = -1  # the scheduler's order, set when the request is added
        self.num_launched = 0
        self.num_computed = 0
        self.num_unknown = 0
        self.incarnation = 0
        self.needs_commit = bool(
            params.logits_processors
            or params.repetition_penalty != 1.0
            or params.frequency_penalty
            or params.presence_penalty
            or params.min_new_tokens
            or any(len(sequence) > 1 for sequence in banned_sequences)
            or self.wants_prompt_logprobs
        )
        self.pages = np.empty(0, np.int32)
        self.num_pages = 0
        self.prefix_lock: int | None = None
        self.num_cached_tokens: int | None = None

        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self.error: BaseException | None = None
        self.called_at = time.perf_counter() if called_at is None else called_at
        self.first_token_at: float | None = None
        self.finished_at: float | None = None

    @property
    def prompt_token_ids(self) -> np.ndarray:
        """int64[num_prompt_tokens]."""
        return self.token_ids[: self.num_prompt_tokens]

    @property
    def known_token_ids(self) -> np.ndarray:
        """int64[num_tokens]: prompt and output so far."""
        return self.token_ids[: self.num_tokens]

    @property
    def known_keys(self) -> np.ndarray:
        """int64[num_tokens]: what the prefix cache knows the known tokens by."""
        return self.keys[: self.num_tokens]

    @property
    def num_expected_tokens(self) -> int:
        """Known tokens, and those that launched steps will give."""
        return self.num_tokens + self.num_unknown

    @property
    def num_pending(self) -> int:
        """Tokens that are still to be computed; 1 while decoding."""
        return self.num_expected_tokens - self.num_launched

    @property
    def max_cached_tokens(self) -> int:
        """How much of the known tokens may come out of the cache.

        The last token is always computed, for its logits. Where prompt log-probabilities are
        wanted, so is every position that gives one which is not there yet.
        """
        limit = self.num_tokens - 1
        if self.misses_prompt_logprobs:
            first = self.num_prompt_tokens - self.num_missing_prompt_logprobs
            limit = min(limit, first - 1)
        return limit

    @property
    def rope_offset(self) -> int:
        """What to add to a position behind the prompt, for M-RoPE."""
        return 0 if self.multimodal is None else self.multimodal.position_offset

    def whole_span_around(self, position: int) -> tuple[int, int] | None:
        """The image around a border between tokens that may not be cut there; see `whole_spans`."""
        if self.multimodal is None or not self.multimodal.whole_spans:
            return None
        return self.multimodal.span_around(position)

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether log-probabilities of the prompt are asked for (by the first of `n` only)."""
        return self.params.prompt_logprobs is not None and self.sample_index == 0

    @property
    def misses_prompt_logprobs(self) -> bool:
        """Whether log-probabilities of the prompt that were asked for are still to come."""
        return self.wants_prompt_logprobs and self.num_missing_prompt_logprobs > 0

    @property
    def num_missing_prompt_logprobs(self) -> int:
        """Prompt positions whose log-probability is still to come."""
        first = max(1, self.params.prompt_logprobs_start)
        return max(0, self.num_prompt_tokens - first - len(self.prompt_logprobs))

    @property
    def is_finished(self) -> bool:
        """Whether nothing more will come."""
        return self.state is FINISHED

    def append(self, token_id: int) -> None:
        """Takes one sampled token, and sets `finish_reason` when it is the last."""
        if self.first_token_at is None:
            self.first_token_at = time.perf_counter()
        self.token_ids[self.num_tokens] = token_id
        if self.keys is not self.token_ids:
            self.keys[self.num_tokens] = token_id
        self.num_tokens += 1
        self.output_token_ids.append(token_id)
        if self.num_tokens >= self.max_tokens:
            self.finish_reason = "length"
        if self._keeps_text or token_id in self._ending_token_ids:
            self.stop_reason = self.stop_checker.add(token_id)
            if self.stop_checker.stopped:
                self.finish_reason = "stop"

    def hold(self, pages: np.ndarray) -> None:
        """Adds `pages` (int32) to the end of the request's own."""
        needed = self.num_pages + len(pages)
        if needed > len(self.pages):
            grown = np.empty(max(needed, 2 * len(self.pages), 16), np.int32)
            grown[: self.num_pages] = self.pages[: self.num_pages]
            self.pages = grown
        self.pages[self.num_pages : needed] = pages
        self.num_pages = needed

    @property
    def held_pages(self) -> np.ndarray:
        """int32[num_pages]."""
        return self.pages[: self.num_pages]

    def continue_from(self, other: "Request") -> None:
        """Takes over what another request with the same prompt and parameters has generated.

        It goes on from there with the tokens that the other one would have got.
        """
        for token_id in other.output_token_ids:
            self.append(token_id)
        self.logprobs = list(other.logprobs)
        self.prompt_logprobs = list(other.prompt_logprobs)
        self.num_cached_tokens = other.num_cached_tokens
        self.called_at = other.called_at
        self.first_token_at = other.first_token_at

    def finish(self, reason: str, error: BaseException | None = None) -> None:
        """Marks the request as done; its pages are the scheduler's affair."""
        try:
            self.stop_checker.finish()
        except BaseException as failure:  # the tokenizer; the text stays as it was
            if error is None:
                reason, error = "error", failed("the text", failure)
        if self.multimodal is not None:
            # Whoever keeps the outputs, or waits for others of the call, needs no pixels; only what
            # was aborted may go on.
            inputs = self.multimodal
            self.multimodal = inputs.released() if reason == "abort" else inputs.emptied()
        self.finish_reason = reason
        self.error = error
        self.finished_at = time.perf_counter()
        # Last, since the thread that waits reads everything else once it sees this.
        self.state = FINISHED
