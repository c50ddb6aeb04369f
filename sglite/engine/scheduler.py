"""Which requests take part in a step, and how many tokens of each. Touches no tensor."""

import bisect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sglite.cache.prefix_cache import CachedPrefix, PrefixCache
from sglite.engine.failures import failed
from sglite.engine.request import FINISHED, RUNNING, WAITING, Request
from sglite.engine.statistics import Statistics
from sglite.interface.errors import OutOfMemoryError

# What a named tuple's own class does to make one is Python code; steps make two for each request.
_new = tuple.__new__


class ScheduledRequest(NamedTuple):
    """The positions `start` to `stop` (exclusive) of a request, computed in one step."""

    request: Request
    start: int
    stop: int
    samples: bool  # whether the step gives the request its next token
    incarnation: int  # the request's, when the step was scheduled

    @property
    def output_index(self) -> int:
        """Which of the request's output tokens the step samples, from 0 on."""
        return self.stop - self.request.num_prompt_tokens


@dataclass(slots=True, frozen=True)
class PageCopy:
    """The first `num_tokens` slots of page `source` go to the request's own `destination`."""

    request: Request
    source: int
    destination: int
    num_tokens: int


@dataclass(slots=True)
class Step:
    """What one forward pass does."""

    items: list[ScheduledRequest] = field(default_factory=list)
    page_copies: list[PageCopy] = field(default_factory=list)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to compute."""
        return not self.items and not self.page_copies

    @property
    def only_decodes(self) -> bool:
        """Whether every request gets its next token from one position, and nothing else.

        The position is not its first, as the one before is where decoding starts from; nor within a
        prompt with images, whose token may stand for a part of one. Log-probabilities of the prompt
        have then come: the position before the last one gives them at the latest.
        """
        for request, start, stop, samples, _ in self.items:
            if not samples or stop - start != 1 or start == 0:
                return False
            if request.multimodal is not None and start < request.num_prompt_tokens:
                return False
        return True


class Outcome(NamedTuple):
    """What a step gave one request: a token, where it was to sample one, or an error."""

    token_id: int | None = None
    logprobs: dict | None = None
    prompt_logprobs: Sequence = ()
    error: BaseException | None = None

    @staticmethod
    def of_tokens(token_ids: Iterable[int]) -> "list[Outcome]":
        """One for each token, of which there is nothing else to tell."""
        return [_new(Outcome, (token_id, None, (), None)) for token_id in token_ids]


# How many requests that wait for a prefix another one is computing are looked past in one step.
_MAX_DEFERRED = 64


class Scheduler:
    """First come, first served, with continuous batching, chunked prefill and preemption.

    Every step takes one token of each decoding request, and chunks of prompts up to
    `chunked_prefill_size` tokens over all requests. Out of pages, the request that came last gives
    up its own, which stay in the tree as long as they can. The oldest running request is never
    preempted for a younger one, so every request finishes.
    """

    def __init__(
        self,
        cache: PrefixCache,
        *,
        max_running_requests: int,
        chunked_prefill_size: int,
        max_logits_rows: int = 1 << 30,
    ):
        self.cache = cache
        self.max_running_requests = max_running_requests
        self.chunked_prefill_size = chunked_prefill_size
        self.max_logits_rows = max_logits_rows
        self.running: list[Request] = []  # in order of arrival
        self.waiting: list[Request] = []  # in order of arrival
        self.statistics = Statistics()
        self._num_arrivals = 0
        self._num_needing_commit = 0

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self.running or self.waiting)

    @property
    def can_run_ahead(self) -> bool:
        """Whether a step may be launched before the one before it is committed."""
        return not self._num_needing_commit

    def add(self, request: Request) -> None:
        """Puts a new request at the end of the queue."""
        request.arrival = self._num_arrivals
        self._num_arrivals += 1
        self._num_needing_commit += request.needs_commit
        self.waiting.append(request)

    def schedule(self) -> Step:
        """Chooses the next step, and books it as launched.

        It is empty only when there is no work, or none that could be launched before the steps
        under way are committed.
        """
        step = Step()
        budget = self.chunked_prefill_size
        preemptions_before = self.statistics.preemptions
        reserve = self._reserve_or_preempt
        for request in tuple(self.running):
            if request.state is RUNNING:  # an older one may have preempted it meanwhile
                budget -= self._extend(step, request, budget, reserve)
        # Right after a preemption there is no room, and admitting would take it from the running.
        if self.statistics.preemptions == preemptions_before or not step.items:
            self._admit(step, budget)
        return step

    def _extend(self, step: Step, request: Request, budget: int, reserve) -> int:
        """Adds the request's next tokens to the step; returns the prefill tokens they took.

        `reserve(request, num_positions)` finds the pages and says whether it could.
        """
        start, expected = request.num_launched, request.num_tokens + request.num_unknown
        if expected >= request.max_tokens:  # steps under way give the last token asked for
            return 0
        is_decode = expected - start == 1
        stop = expected if is_decode else self._chunk_end(request, start, expected, budget)
        has_room = stop <= request.num_pages * self.cache.page_size
        if stop <= start or not (has_room or reserve(request, stop)):
            return 0
        samples = stop == expected
        step.items.append(
            _new(ScheduledRequest, (request, start, stop, samples, request.incarnation))
        )
        request.num_launched = stop
        request.num_unknown += samples
        return 0 if is_decode else stop - start

    def _chunk_end(self, request: Request, start: int, expected: int, budget: int) -> int:
        """Where the next chunk of a request ends of which more than a token is to be computed."""
        count = min(expected - start, budget, self._max_chunk(request))
        return self._at_span_border(request, start, start + count, budget)

    def _at_span_border(self, request: Request, start: int, stop: int, budget: int) -> int:
        """Where a chunk ends that was to end at `stop`, which may lie inside a whole span.

        Before the span; or behind it where nothing else would be left of the chunk, once the whole
        budget of a step is the request's.
        """
        span = request.whole_span_around(stop)
        if span is None:
            return stop
        if span[0] > start or budget < self.chunked_prefill_size:
            return max(span[0], start)
        return span[1]

    def _max_chunk(self, request: Request) -> int:
        """Prompt log-probabilities need a row of logits for each token, so the chunk is limited."""
        return self.max_logits_rows if request.wants_prompt_logprobs else request.num_pending

    def _reserve(self, request: Request, num_positions: int) -> bool:
        """Gives the request pages for its first `num_positions`, if that many can be had."""
        missing = self._num_pages(num_positions) - request.num_pages
        if missing <= 0:
            return True
        pages = self.cache.allocate(missing)
        if pages is None:
            return False
        request.hold(pages)
        return True

    def _reserve_or_preempt(self, request: Request, num_positions: int) -> bool:
        """The same, at the cost of younger requests; False when it had to give up its own pages."""
        while not self._reserve(request, num_positions):
            victim = self.running[-1]
            if victim is request and len(self.running) == 1:
                self.remove(request, "error", self._no_room(num_positions))
                return False
            self._preempt(victim)
            if victim is request:
                return False
        return True

    def _no_room(self, num_positions: int) -> OutOfMemoryError:
        return OutOfMemoryError(
            f"the KV cache has {self.cache.num_available} of the {self._num_pages(num_positions)} "
            f"pages that one request alone needs; raise kv_cache_tokens"
        )

    def _num_pages(self, num_positions: int) -> int:
        return -(-num_positions // self.cache.page_size)

    def _admit(self, step: Step, budget: int) -> None:
        """Starts waiting requests, oldest first, while there is budget and room."""
        deferred = 0
        for request in tuple(self.waiting):
            if budget <= 0 or len(self.running) >= self.max_running_requests:
                return
            if request.num_unknown:  # preempted under way: its next token is still to come
                continue
            if self._prefix_is_being_computed(request):
                deferred += 1
                if deferred >= _MAX_DEFERRED:
                    return
                continue
            if not self._start(step, request):
                return
            budget -= self._extend(step, request, budget, self._reserve)

    def _start(self, step: Step, request: Request) -> bool:
        """Moves a waiting request to the running ones, with its cached prefix, if it has room."""
        prefix = self.cache.acquire(
            request.known_keys, request.namespace, self._max_cached_tokens(request)
        )
        own_pages = self._num_pages(request.num_tokens) - len(prefix.pages)
        promised = sum(
            max(0, self._num_pages(other.num_expected_tokens) - other.num_pages)
            for other in self.running
        )
        if self.running and own_pages + promised > self.cache.num_available:
            self._give_back(prefix)
            return False
        own = None
        if prefix.partial_page is not None:
            own = self.cache.allocate(1)
            if own is None:  # only with everything else in use; those tokens are computed again
                self._give_back(prefix)
                most = self._whole_pages(request, prefix.num_tokens)
                prefix = self.cache.acquire(request.known_keys, request.namespace, most)
        request.prefix_lock = prefix.lock
        request.num_pages = 0
        request.hold(prefix.pages)
        request.num_computed = len(prefix.pages) * self.cache.page_size
        if own is not None:
            self._copy_on_write(step, request, prefix, own)
        request.num_launched = request.num_computed
        if request.num_cached_tokens is None:
            request.num_cached_tokens = request.num_computed
            self.statistics.prompt_tokens += request.num_prompt_tokens
            self.statistics.cached_tokens += request.num_computed
        request.state = RUNNING
        self.waiting.remove(request)
        bisect.insort(self.running, request, key=lambda other: other.arrival)
        return True

    def _max_cached_tokens(self, request: Request) -> int:
        """How much may come out of the cache: no part of a span that has to be whole."""
        most = request.max_cached_tokens
        if request.multimodal is None or not request.multimodal.whole_spans:
            return most
        found = self.cache.match_length(request.known_keys[:most], request.namespace)
        span = request.whole_span_around(found)
        return found if span is None else span[0]

    def _whole_pages(self, request: Request, num_tokens: int) -> int:
        """How many of its first tokens fill whole pages, and end in no span that is to be whole."""
        page_size = self.cache.page_size
        most = num_tokens // page_size * page_size
        while span := request.whole_span_around(most):
            most = span[0] // page_size * page_size
        return most

    def _give_back(self, prefix: CachedPrefix) -> None:
        self.cache.release(prefix.pages, prefix.lock)
        if prefix.partial_page is not None:
            self.cache.release([prefix.partial_page])

    def _copy_on_write(
        self, step: Step, request: Request, prefix: CachedPrefix, own: NDArray[np.int32]
    ) -> None:
        """Takes over the part of a shared page that matches, in a page of the request's own."""
        request.hold(own)
        step.page_copies.append(
            PageCopy(request, prefix.partial_page, int(own[0]), prefix.partial_tokens)
        )
        request.num_computed += prefix.partial_tokens

    def _prefix_is_being_computed(self, request: Request) -> bool:
        """Whether a running prefill will soon have put more of this prompt into the tree.

        Requests that arrive together often share a long prefix; without waiting for the first of
        them, every one would compute it.
        """
        if not self.cache.enabled:
            return False
        keys = request.known_keys[: max(0, request.max_cached_tokens)]
        cached = None
        for other in self.running:
            is_decode = other.num_tokens - other.num_computed <= 1
            if is_decode or other.namespace != request.namespace:
                continue
            common = common_prefix_length(keys, other.known_keys)
            if common < self.cache.page_size or common <= other.num_computed:
                continue
            if cached is None:
                cached = self.cache.match_length(keys, request.namespace)
            if common >= cached + self.cache.page_size:
                return True
        return False

    def commit(self, step: Step, outcomes: Iterable[Outcome]) -> None:
        """Books what a step has computed: tokens, finished requests, prefixes for the tree.

        A request that has ended since the step was launched gets nothing of it; one that has been
        preempted gets its token.
        """
        num_tokens = 0
        for item, outcome in zip(step.items, outcomes, strict=True):
            request, start, stop, samples, incarnation = item
            token_id, logprobs, prompt_logprobs, error = outcome
            request.num_unknown -= samples
            if request.state is FINISHED:
                continue
            is_whole = incarnation == request.incarnation
            if is_whole:
                request.num_computed = stop
            if error is not None:
                self.remove(request, "error", error)
                continue
            if prompt_logprobs:
                request.prompt_logprobs.extend(prompt_logprobs)
            if token_id is not None:
                if logprobs is not None:
                    request.logprobs.append(logprobs)
                try:
                    request.append(token_id)
                except BaseException as failure:  # the tokenizer, looking for stop strings
                    self.remove(request, "error", failed("the text", failure))
                    continue
                num_tokens += 1
            if request.finish_reason:
                self.remove(request, request.finish_reason)
            elif is_whole and stop - start > 1:
                self._store(request)
        self.statistics.completion_tokens += num_tokens

    def fail(self, step: Step, error: BaseException) -> None:
        """Ends every request of a step that could not be run; what it computed is dropped.

        Args:
            step: as `schedule` gave it.
            error: what was raised. Each request has an error of its own, of which this is the
                cause: whoever raises his changes its traceback.
        """
        for item in step.items:
            item.request.num_unknown -= item.samples
        concerned = [item.request for item in step.items]
        concerned += [copy.request for copy in step.page_copies]
        self.release_copied(step)
        for request in concerned:
            if not request.is_finished:
                self.remove(request, "error", failed("the step", error))

    def release_copied(self, step: Step) -> None:
        """Gives back the shared pages of a launched step's copies.

        Steps are computed in order, so nothing writes to such a page before it has been copied.
        """
        for copy in step.page_copies:
            self.cache.release([copy.source])
        step.page_copies.clear()

    def remove(self, request: Request, reason: str, error: BaseException | None = None) -> None:
        """Finishes a running or waiting request and gives its pages back, to the tree if sound."""
        if request.state is RUNNING:
            if error is None:
                self._store(request)
            self._release(request)
            self.running.remove(request)
        elif request.state is WAITING:
            self.waiting.remove(request)
        self._num_needing_commit -= request.needs_commit
        request.finish(reason, error)

    def reset(self, error: BaseException, requests: Iterable[Request] = ()) -> None:
        """Ends every request with an error and empties the cache, whatever state they are in.

        Args:
            error: what was raised; see `fail`.
            requests: further ones to end, which stand in no queue.
        """
        unfinished = [*self.running, *self.waiting, *requests]
        self.running, self.waiting = [], []
        self._num_needing_commit = 0
        for request in unfinished:
            if not request.is_finished:
                request.num_pages, request.prefix_lock = 0, None
                request.finish("error", failed("the step", error))
        self.cache.reset()

    def _preempt(self, request: Request) -> None:
        self._store(request)
        self._release(request)
        request.num_computed = request.num_launched = 0
        request.incarnation += 1
        request.state = WAITING
        self.running.remove(request)
        bisect.insort(self.waiting, request, key=lambda other: other.arrival)
        self.statistics.preemptions += 1

    def _store(self, request: Request) -> None:
        computed = request.num_computed
        self.cache.store(
            request.keys[:computed],
            request.pages[: self._num_pages(computed)],
            request.namespace,
            lock=request.prefix_lock,
        )

    def _release(self, request: Request) -> None:
        self.cache.release(request.held_pages, request.prefix_lock)
        request.prefix_lock = None
        request.num_pages = 0


def common_prefix_length(a: np.ndarray, b: np.ndarray) -> int:
    """How many elements the two arrays share from the start."""
    length = min(len(a), len(b))
    if length == 0 or a[0] != b[0]:
        return 0
    differs = a[:length] != b[:length]
    first = int(differs.argmax())
    return first if differs[first] else length
