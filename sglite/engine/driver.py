"""The thread that runs the steps, and the calls that wait for it.

The thread lives only while requests do: an idle engine has no thread and nothing that pins it.
Callers never touch the engine; they hand requests over, set flags that are read between two steps,
and wait.
"""

import asyncio
import logging
import os
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from queue import SimpleQueue

from sglite.engine.engine import Engine
from sglite.engine.request import Request
from sglite.interface.errors import EngineClosedError, SGLiteError

_log = logging.getLogger(__name__)


class Call:
    """The requests of one call of the library, and the thread that waits for them.

    Attributes:
        requests: in the order in which the caller asked.
        is_submitted: whether a driver has it; set by the driver.
    """

    def __init__(self, requests: Sequence[Request], *, every_token: bool = False):
        self.requests = list(requests)
        self.is_submitted = False
        self._every_token = every_token
        # Not a Condition: an interrupt in the wrong place makes that raise something else.
        self._wakes: SimpleQueue[None] = SimpleQueue()
        self._news = 0
        self._num_finished = 0
        self._owner = threading.current_thread()
        self._abort_requested = False

    @property
    def is_finished(self) -> bool:
        """Whether all requests are finished."""
        return all(request.is_finished for request in self.requests)

    @property
    def is_abandoned(self) -> bool:
        """Whether nobody can want the results: aborted, or its thread has ended."""
        return self._abort_requested or not self._owner.is_alive()

    def wait(self, seen: int = 0) -> int:
        """Blocks until something has changed since `seen`; returns what to pass next time.

        A finished request is a change; with `every_token`, so is a new token.
        """
        self._owner = threading.current_thread()
        while self._news == seen and not self.is_finished:
            self._wakes.get()
        return self._news

    def request_abort(self) -> None:
        """Asks the driver to end the unfinished requests before its next step."""
        self._abort_requested = True

    def announce(self) -> None:
        """Called by the driver after a step: wakes the caller if there is news for it."""
        num_finished = sum(request.is_finished for request in self.requests)
        if self._every_token or num_finished > self._num_finished:
            self._wake()
            self._num_finished = num_finished

    def _wake(self) -> None:
        self._news += 1
        if self._wakes.empty():  # one is enough, however much there is to see
            self._wakes.put(None)


class TaskCall(Call):
    """A call that a task of the running event loop waits for."""

    def __init__(self, requests: Sequence[Request], *, every_token: bool = False):
        super().__init__(requests, every_token=every_token)
        self._loop = asyncio.get_running_loop()
        self._event = asyncio.Event()

    async def wait_in_loop(self, seen: int) -> int:
        """`wait` for a task: the loop goes on meanwhile."""
        while True:
            self._event.clear()  # before the look, so that nothing new is slept through
            if self._news != seen or self.is_finished:
                return self._news
            await self._event.wait()

    def _wake(self) -> None:
        super()._wake()
        try:
            self._loop.call_soon_threadsafe(self._event.set)
        except RuntimeError:  # the loop is closed: nobody waits any more
            self.request_abort()


class Driver:
    """Runs an engine's steps on a thread of its own while there are requests.

    Args:
        engine: what to run; nothing else may touch it while the thread lives.
        thread_state: makes the context in which the thread works (gradient mode, thread counts).
    """

    def __init__(self, engine: Engine, thread_state: Callable[[], AbstractContextManager]):
        self._engine = engine
        self._thread_state = thread_state
        self._lock = threading.Lock()
        self._inbox: list[Call] = []
        self._thread: threading.Thread | None = None
        self._closed = False
        self._process = os.getpid()

    @property
    def is_forked(self) -> bool:
        """Whether this is a copy in a forked process, where its thread does not live on."""
        return os.getpid() != self._process

    def submit(self, call: Call) -> None:
        """Hands a call's requests to the engine, starting the thread if there is none."""
        if threading.current_thread() is self._thread:
            raise SGLiteError(
                "this LLM was called from within its own step (a logits processor, say), where "
                "it would wait for itself"
            )
        with self._lock:
            if self._closed:
                raise EngineClosedError("this LLM is closed; make a new one")
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="sglite-driver")
                thread.start()  # waits for the lock, and for the call
                self._thread = thread
            self._inbox.append(call)
            call.is_submitted = True

    def abort(self, call: Call) -> None:
        """Ends the call's unfinished requests at the next step border, and waits until it is so."""
        call.request_abort()
        seen = 0
        while call.is_submitted and not call.is_finished:
            seen = call.wait(seen)

    def close(self) -> None:
        """Ends all requests and the thread; further calls are refused. May be called again."""
        with self._lock:
            self._closed = True
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _run(self) -> None:
        calls: list[Call] = []
        try:
            with self._thread_state():
                while True:
                    with self._lock:
                        calls += self._inbox
                        arrived, self._inbox = self._inbox, []
                        if not calls and not self._engine.has_work:
                            self._thread = None
                            return
                    self._turn(calls, arrived)
        except BaseException as error:  # what a turn cannot catch: the thread's state, say
            with self._lock:
                if self._thread is threading.current_thread():
                    self._thread = None
                    calls += self._inbox
                    self._inbox = []
            self._fail(calls, error)

    def _turn(self, calls: list[Call], arrived: Sequence[Call]) -> None:
        """One step, with what its calls want done before, and what they are told afterwards."""
        try:
            for call in arrived:
                for request in call.requests:
                    self._engine.add(request)
            for call in calls:
                if self._closed or call.is_abandoned:
                    for request in call.requests:
                        self._engine.abort(request)
            if self._engine.has_work:
                self._engine.step()
            elif not all(call.is_finished for call in calls):
                raise RuntimeError("the engine has lost a request")
            for call in calls:
                call.announce()
        except BaseException as error:  # nobody may be left waiting, whatever happened
            self._fail(calls, error)
        calls[:] = [call for call in calls if not call.is_finished]

    def _fail(self, calls: Sequence[Call], error: BaseException) -> None:
        """Ends all requests with an error, those too that have not reached the scheduler."""
        self._engine.fail_all(error, [request for call in calls for request in call.requests])
        if calls:
            _log.error("all running requests have failed", exc_info=error)
        for call in calls:
            call.announce()
