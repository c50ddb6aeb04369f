"""The engine: schedule, run, commit."""

import time
from typing import Protocol

from sglite.engine.request import Request
from sglite.engine.scheduler import Outcome, Scheduler, Step
from sglite.interface.errors import RequestError


class Runner(Protocol):
    """What computes a step: `sglite.engine.model_runner.ModelRunner`, or a test's stand-in."""

    def run(self, step: Step) -> list[Outcome]:
        """Computes the step's tokens; gives one outcome for each of its requests, in order."""

    def close(self) -> None:
        """Drops what it holds."""


class Engine:
    """Owns the scheduler and the model runner. Used by one thread at a time."""

    def __init__(self, scheduler: Scheduler, runner: Runner):
        self.scheduler = scheduler
        self.runner = runner

    def add(self, request: Request) -> None:
        """Takes a new request; it takes part from the next step on."""
        self.scheduler.add(request)

    def abort(self, request: Request) -> None:
        """Ends a request between two steps; what it computed stays in the prefix cache."""
        if not request.is_finished:
            self.scheduler.remove(request, "abort")

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished."""
        return self.scheduler.has_work

    def step(self) -> None:
        """Runs one step. What fails in it fails the requests that took part, and no others."""
        started = time.perf_counter()
        step = self.scheduler.schedule()
        try:
            outcomes = self.runner.run(step)
        except Exception as error:
            self.scheduler.fail(step, _step_failed(error))
        else:
            self.scheduler.commit(step, outcomes)
        self.scheduler.statistics.count_step(time.perf_counter() - started)

    def fail_all(self, error: BaseException) -> None:
        """Ends every request with an error, when not even the step's bookkeeping went through."""
        for request in (*self.scheduler.running, *self.scheduler.waiting):
            self.scheduler.remove(request, "error", _step_failed(error))

    def close(self) -> None:
        """Drops the tensors of the cache and the model."""
        self.runner.close()


def _step_failed(error: BaseException) -> RequestError:
    """The error of the requests that took part in a step which raised; `error` is its cause."""
    failure = RequestError(f"the step failed: {type(error).__name__}: {error}")
    failure.__cause__ = error
    return failure
