"""Calls: the requests of one call of the library, and the thread or task that waits for them."""

import asyncio
import os
import threading
from collections.abc import Sequence
from queue import Empty, SimpleQueue

from sglite.engine.request import FINISHED, Request
from sglite.interface.errors import EngineClosedError

FORKED = (
    "this LLM was made in another process, of which this one is a fork: its threads are not here; "
    "make a new one"
)

# Seconds that what Python's collector may have begun waits for the driver, at most: it runs in any
# thread and with any lock held, so that the driver may be waiting for it.
PATIENCE = 1.0


class Call:
    """The requests of one call of the library, and the thread that waits for them.

    Args:
        requests: in the order in which the caller asked.
        every_token: whether the caller is told of every token, as of a stream; such a call may be
            read by one thread after the other.

    Attributes:
        requests: as given.
        is_submitted: whether a driver has it; set by the driver.
        ended_as: what happened while it was running, if it did not run to its end; set by the
            driver.
    """

    def __init__(self, requests: Sequence[Request], *, every_token: bool = False):
        self.requests = list(requests)
        self.is_submitted = False
        self.ended_as: str | None = None
        self._every_token = every_token
        # Not a Condition: an interrupt in the wrong place makes that raise something else.
        self._wakes: SimpleQueue[None] = SimpleQueue()
        self._news = 0
        self._num_finished = 0
        self._owner = threading.current_thread()
        self._outlives_owner = every_token
        self._abort_requested = False
        self._process = os.getpid()

    @property
    def is_finished(self) -> bool:
        """Whether all requests are finished."""
        return all(request.is_finished for request in self.requests)

    @property
    def why_abandoned(self) -> str | None:
        """Why nobody can want the results, as the half of a sentence; None: somebody may."""
        if self._abort_requested:
            return "it was aborted"
        is_alive = self._owner.is_alive()
        # Daemons are no reason for the interpreter to stay.
        if not threading.main_thread().is_alive() and (self._owner.daemon or not is_alive):
            return "the program ended"
        if not is_alive and not self._outlives_owner:
            return "its thread ended"
        return None

    def wait(self, seen: int = 0, timeout: float | None = None) -> int:
        """Blocks until something has changed since `seen`; returns what to pass next time.

        A finished request is a change; with `every_token`, so is a new token.

        Args:
            seen: what the last time has returned.
            timeout: seconds after which it returns in any case.

        Raises:
            EngineClosedError: in a fork, where nothing will change any more.
        """
        self._owner = threading.current_thread()
        while self._news == seen and not self.is_finished:
            self._check_process()
            try:
                self._wakes.get(timeout=timeout)
            except Empty:
                break
        return self._news

    def request_abort(self) -> None:
        """Asks the driver to end the unfinished requests before its next step.

        Takes no lock and waits for nothing: the collector may call it anywhere.
        """
        self._abort_requested = True

    def announce(self) -> None:
        """Called by the driver after a step: wakes the caller if there is news for it."""
        num_finished = [request.state for request in self.requests].count(FINISHED)
        if self._every_token or num_finished > self._num_finished:
            self._wake()
            self._num_finished = num_finished

    def _wake(self) -> None:
        self._news += 1
        if self._wakes.empty():  # one is enough, however much there is to see
            self._wakes.put(None)

    def _check_process(self) -> None:
        if os.getpid() != self._process:
            raise EngineClosedError(FORKED)


class TaskCall(Call):
    """A call that a task of the running event loop waits for."""

    def __init__(self, requests: Sequence[Request], *, every_token: bool = False):
        super().__init__(requests, every_token=every_token)
        self._outlives_owner = False  # the loop's thread
        self._loop = asyncio.get_running_loop()
        self._event = asyncio.Event()

    async def wait_in_loop(self, seen: int) -> int:
        """`wait` for a task: the loop goes on meanwhile."""
        while True:
            self._event.clear()  # before the look, so that nothing new is slept through
            if self._news != seen or self.is_finished:
                return self._news
            self._check_process()
            await self._event.wait()

    def _wake(self) -> None:
        super()._wake()
        try:
            self._loop.call_soon_threadsafe(self._event.set)
        except RuntimeError:  # the loop is closed: nobody waits any more
            self.request_abort()
