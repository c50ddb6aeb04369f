"""Errors on their way out of the library: whoever keeps one keeps nothing of the engine with it.

A notebook, a debugger or a test keeps the last error, its traceback, and so the frames that it came
through, with all their variables: the engine and its tensors would stay after `del llm`.
"""

import contextlib
import functools
import inspect
import traceback
from collections.abc import Callable
from typing import TypeVar

from sglite.engine.failures import errors_behind

_PACKAGE = __name__.partition(".")[0]
_Method = TypeVar("_Method", bound=Callable)


def keeps_nothing(method: _Method) -> _Method:
    """A method, or one that is a coroutine or a generator; no error that leaves it holds `self`."""

    @functools.wraps(method)
    def call(self, *arguments, **keywords):
        try:
            return method(self, *arguments, **keywords)
        except BaseException as error:
            empty_frames(error)
            del self, arguments, keywords  # this frame is in the traceback as well
            raise

    @functools.wraps(method)
    async def await_it(self, *arguments, **keywords):
        try:
            return await method(self, *arguments, **keywords)
        except BaseException as error:
            empty_frames(error)
            del self, arguments, keywords
            raise

    @functools.wraps(method)
    def iterate(self, *arguments, **keywords):
        try:
            yield from method(self, *arguments, **keywords)
        except BaseException as error:
            empty_frames(error)
            del self, arguments, keywords
            raise

    if inspect.iscoroutinefunction(method):
        return await_it
    return iterate if inspect.isgeneratorfunction(method) else call


def empty_frames(error: BaseException) -> None:
    """Empties those frames behind an error that are the library's own and have ended."""
    for each in errors_behind(error):
        for frame, _ in traceback.walk_tb(each.__traceback__):
            if str(frame.f_globals.get("__name__")).partition(".")[0] == _PACKAGE:
                with contextlib.suppress(RuntimeError):  # it is still running
                    frame.clear()


def empty_all_frames(error: BaseException, handled: BaseException | None) -> None:
    """Empties all frames behind an error, such as those of other libraries that hold weights.

    Args:
        error: what has been raised.
        handled: what the program was dealing with when it called the library; stays as it is.
    """
    for each in errors_behind(error, unless=handled):
        traceback.clear_frames(each.__traceback__)
