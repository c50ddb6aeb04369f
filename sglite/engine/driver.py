"""The thread that runs the steps, and the calls that wait for it.

The thread lives only while requests do: an idle engine has no thread and nothing that pins it.
Callers never touch the engine; they hand requests over, set flags that are read between two steps,
and wait.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

from sglite.engine.engine import Engine
from sglite.engine.failures import report
from sglite.engine.waiting import Call
from sglite.interface.errors import EngineClosedError, SGLiteError

_log = logging.getLogger(__name__)


class Driver:
    """Runs an engine's steps on a thread of its own while there are requests.

    Args:
        engine: what to run; nothing else may touch it while the thread lives.
        thread_state: makes the context in which the thread works (gradient mode, thread counts).
    """

    def __init__(self, engine: Engine, thread_state: Callable[[], AbstractContextManager]):
        self._engine = engine
        self._thread_state = thread_state
        # Python's collector may run `close` in a thread that holds the lock already.
        self._lock = threading.RLock()
        self._inbox: list[Call] = []
        self._thread: threading.Thread | None = None
        self._last_thread: threading.Thread | None = None  # which may still be ending
        self._closed = False
        self._at_the_end: Callable[[], None] | None = None
        self._process = os.getpid()

    @property
    def is_forked(self) -> bool:
        """Whether this is a copy in a forked process, where its thread does not live on."""
        return os.getpid() != self._process

    @property
    def _is_this_thread(self) -> bool:
        thread = self._thread  # which another one may change at any moment
        return thread is not None and thread.ident == threading.get_ident()

    def submit(self, call: Call) -> None:
        """Hands a call's requests to the engine, starting the thread if there is none."""
        self._refuse_own_thread()
        with self._lock:
            if self._closed:
                raise EngineClosedError("this LLM is closed; make a new one")
            if self._thread is None or not self._thread.is_alive():
                # Not a daemon, whatever this thread is: at the interpreter's end those are stopped
                # wherever they are, in the middle of a kernel too.
                thread = threading.Thread(target=self._run, name="sglite-driver", daemon=False)
                thread.start()  # waits for the lock, and for the call
                self._thread = self._last_thread = thread
            self._inbox.append(call)
            call.is_submitted = True

    def wait(self, call: Call, seen: int = 0) -> int:
        """`Call.wait`, but for a thread that would wait for itself."""
        self._refuse_own_thread()
        return call.wait(seen)

    def _refuse_own_thread(self) -> None:
        if self._is_this_thread:
            raise SGLiteError(
                "this LLM was called from within its own step (a logits processor, say), where "
                "it would wait for itself"
            )

    def abort(self, call: Call, patience: float | None = None) -> None:
        """Ends the call's unfinished requests at the next step border, and waits until it is so.

        Within a step, and in a fork, it does not wait, as it would do so for ever.

        Args:
            call: need not have been submitted.
            patience: seconds that it waits at most.
        """
        call.request_abort()
        if self.is_forked or self._is_this_thread:
            return
        deadline = None if patience is None else time.monotonic() + patience
        seen, left = 0, patience
        while call.is_submitted and not call.is_finished:
            if deadline is not None:
                left = deadline - time.monotonic()
                if left <= 0:
                    return
            seen = call.wait(seen, left)

    def close(
        self, at_the_end: Callable[[], None] = lambda: None, patience: float | None = None
    ) -> None:
        """Ends all requests and the thread; further calls are refused. May be called again.

        Args:
            at_the_end: called once no step runs any more: by this thread or, where that does not
                wait so long or is the driver's own, by the driver's.
            patience: seconds that this waits at most.
        """
        with self._lock:
            self._closed = True
            thread = self._last_thread
        # One that has nothing left to do too: what it frees as it ends is then freed.
        if thread is not None and thread is not threading.current_thread():
            thread.join(patience)
        with self._lock:
            if self._thread is not None and self._thread.is_alive():
                self._at_the_end = at_the_end
                return
        at_the_end()

    def _run(self) -> None:
        calls: list[Call] = []
        try:
            with self._thread_state():
                self._serve(calls)
        except BaseException as error:  # what a turn cannot catch: the thread's state, say
            try:
                self._give_up(calls, error)
            except BaseException as another:  # memory is short, say; nobody may be left waiting
                self._give_up(calls, another)
        at_the_end = None
        with self._lock:
            if self._thread is None or self._is_this_thread:
                at_the_end, self._at_the_end = self._at_the_end, None
        if at_the_end is not None:
            at_the_end()

    def _serve(self, calls: list[Call]) -> None:
        """Takes turns until there is nothing to do; `calls` are those that are under way."""
        while True:
            with self._lock:
                if not self._is_this_thread:
                    return  # an interrupt fell into `submit`, which knows nothing of this thread
                calls += self._inbox
                arrived, self._inbox = self._inbox, []
                if not calls and not self._engine.has_work:
                    self._engine.rest()
                    self._thread = None
                    return
            self._turn(calls, arrived)

    def _turn(self, calls: list[Call], arrived: Sequence[Call]) -> None:
        """One step, with what its calls want done before, and what they are told afterwards."""
        try:
            for call in arrived:
                for request in call.requests:
                    self._engine.add(request)
            for call in calls:
                reason = "this LLM was closed" if self._closed else call.why_abandoned
                if reason:
                    call.ended_as = call.ended_as or reason
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
            report(_log.error, "all running requests have failed", error=error)
        calls[:] = [call for call in calls if not call.is_finished]

    def _give_up(self, calls: list[Call], error: BaseException) -> None:
        """Ends the thread with an error, and with it all calls that it has or was to have."""
        with self._lock:
            if self._is_this_thread:
                calls += self._inbox
                self._inbox = []
                self._fail(calls, error)
                self._thread = None
        report(_log.error, "the thread that runs the steps has failed", error=error)

    def _fail(self, calls: Sequence[Call], error: BaseException) -> None:
        """Ends all requests with an error, those too that have not reached the scheduler."""
        self._engine.fail_all(error, [request for call in calls for request in call.requests])
        for call in calls:
            call.announce()
