"""The engine: schedule, run, commit."""

import logging
import time
from collections.abc import Sequence
from typing import Protocol

from sglite.engine.failures import detach, report
from sglite.engine.request import Request
from sglite.engine.scheduler import Outcome, Scheduler, Step

_log = logging.getLogger(__name__)


class LaunchedStep(Protocol):
    """A step that is being computed."""

    def outcomes(self) -> list[Outcome]:
        """Waits for the step; gives one outcome for each of its requests, in order."""


class Runner(Protocol):
    """What computes a step: `sglite.engine.model_runner.ModelRunner`, or a test's stand-in.

    Attributes:
        runs_ahead: whether `launch` returns before the step is computed, so that the next one may
            be launched before this one's outcomes are known. Tokens that a step in flight samples
            are then handed to the next one inside the runner.
    """

    runs_ahead: bool

    def launch(self, step: Step) -> LaunchedStep:
        """Begins to compute a step; steps are computed in the order of the calls."""

    def stats(self) -> dict[str, int]:
        """Counts of its own; see `LLM.stats`."""

    def rest(self) -> None:
        """Lets go of the requests that it knows, as there are none left."""

    def close(self) -> None:
        """Drops what it holds."""


class Engine:
    """Owns the scheduler and the model runner. Used by one thread at a time.

    With a runner that runs ahead, a step is launched before the one before it is committed: the
    device then never waits for the host. What a request gets after its end is dropped.
    """

    def __init__(self, scheduler: Scheduler, runner: Runner):
        self.scheduler = scheduler
        self.runner = runner
        self._in_flight: tuple[Step, LaunchedStep] | None = None

    def add(self, request: Request) -> None:
        """Takes a new request; it takes part from the next step on."""
        self.scheduler.add(request)

    def abort(self, request: Request) -> None:
        """Ends a request between two steps; what it computed stays in the prefix cache."""
        if not request.is_finished:
            self.scheduler.remove(request, "abort")

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished, or a step under way."""
        return self.scheduler.has_work or self._in_flight is not None

    def stats(self) -> dict[str, int | float]:
        """Counts so far, and what the cache holds now; see `LLM.stats`."""
        scheduler, cache = self.scheduler, self.scheduler.cache
        counts = scheduler.statistics
        return {
            "kv_tokens_total": cache.num_pages * cache.page_size,
            "kv_tokens_used": (cache.num_pages - cache.num_free) * cache.page_size,
            "kv_tokens_cached": cache.num_cached_tokens,
            "running": len(scheduler.running),
            "waiting": len(scheduler.waiting),
            "prompt_tokens": counts.prompt_tokens,
            "cached_tokens": counts.cached_tokens,
            "completion_tokens": counts.completion_tokens,
            "preemptions": counts.preemptions,
            "steps": counts.steps,
            "tokens_per_second": counts.tokens_per_second,
            **self.runner.stats(),
        }

    def step(self) -> None:
        """Launches a step and commits the one before it, or the same one where none runs ahead.

        What fails in a step fails the requests that took part, and no others.
        """
        started = time.perf_counter()
        if not self.scheduler.can_run_ahead:
            self._commit()
        step = self.scheduler.schedule()
        launched = self._launch(step)
        self._commit()
        self._in_flight = launched
        if not self.runner.runs_ahead:
            self._commit()
        self.scheduler.statistics.count_step(time.perf_counter() - started)

    def _launch(self, step: Step) -> tuple[Step, LaunchedStep] | None:
        if step.is_empty:
            return None
        try:
            launched = self.runner.launch(step)
        except BaseException as error:  # Rust's panics and SystemExit are no `Exception`
            self._fail(step, error)
            return None
        self.scheduler.release_copied(step)
        return step, launched

    def _commit(self) -> None:
        """Waits for the step in flight, if there is one, and books what it gave."""
        if self._in_flight is None:
            return
        (step, launched), self._in_flight = self._in_flight, None
        try:
            outcomes = launched.outcomes()
        except BaseException as error:
            self._fail(step, error)
        else:
            self.scheduler.commit(step, outcomes)

    def _fail(self, step: Step, error: BaseException) -> None:
        detach(error)  # a log may be kept: from now on it holds nothing but text
        self.scheduler.fail(step, error)
        report(_log.warning, "a step of %d requests has failed", len(step.items), error=error)

    def fail_all(self, error: BaseException, requests: Sequence[Request] = ()) -> None:
        """Ends every request with an error, when not even the step's bookkeeping went through.

        The prefix cache is emptied with them, since nobody knows what state it was left in.

        Args:
            error: what happened.
            requests: further ones that may be unfinished, unknown to the scheduler.
        """
        self._in_flight = None
        self.scheduler.reset(detach(error), requests)

    def rest(self) -> None:
        """To be called when there is no work: holds on to no request that has ended."""
        self.runner.rest()

    def close(self) -> None:
        """Drops the tensors of the cache and the model."""
        self._in_flight = None
        self.runner.close()
