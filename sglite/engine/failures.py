"""From whatever was raised in a step to the error of the requests concerned."""

import contextlib
import traceback
from collections.abc import Callable

from sglite.interface.errors import RequestError

_NOTE = "In the engine's thread (most recent call last):\n"


def failed(what: str, error: BaseException) -> RequestError:
    """The error of a request that `error` has ended, which becomes its detached cause.

    Args:
        what: "the step", say.
        error: what was raised, once it has been caught.
    """
    failure = RequestError(f"{what} failed: {words_of(error)}")
    failure.__cause__ = detach(error)
    return failure


def words_of(error: BaseException) -> str:
    """Kind and text of an error, whatever becomes of it when it is asked for its text."""
    try:
        return f"{type(error).__name__}: {error}"
    except BaseException:
        return f"{type(error).__name__}, which cannot be printed"


def detach(error: BaseException) -> BaseException:
    """Makes notes of the tracebacks of an error and of those behind it; returns the error.

    A traceback holds its frames and those of all callers, with everything in their variables: the
    engine, its tensors, and the very requests whose error it is.
    """
    for each in errors_behind(error):
        if each.__traceback__ is not None:
            # An error may refuse to be changed, and a source to be read; the rest is done anyway.
            with contextlib.suppress(BaseException):
                _note(each)
            BaseException.with_traceback(each, None)
    return error


def _note(error: BaseException) -> None:
    """Writes down the traceback, in the place of an earlier one if the object is raised again."""
    lines = "".join(traceback.format_tb(error.__traceback__))
    notes = getattr(error, "__notes__", [])
    notes[:] = [note for note in notes if not str(note).startswith(_NOTE)]
    error.add_note(_NOTE + lines)


def report(
    log: Callable[..., None], message: str, *arguments: object, error: BaseException
) -> None:
    """Logs an error; what the program's own filters and handlers raise then ends here.

    Args:
        log: a logger's `error`, say.
        message, arguments: as it takes them.
        error: what was raised.
    """
    with contextlib.suppress(BaseException):
        log(message, *arguments, exc_info=error)


def errors_behind(error: BaseException, unless: BaseException | None = None) -> list[BaseException]:
    """The error, what caused it, what was being handled then, and so on.

    Args:
        error: the last one.
        unless: is left out, with what is behind it.
    """
    found: list[BaseException] = []
    waiting: list[BaseException | None] = [error]
    while waiting:
        each = waiting.pop()
        # By identity, as errors may have an `==` of their own.
        if each is None or each is unless or any(each is other for other in found):
            continue
        found.append(each)
        waiting += [each.__context__, each.__cause__]
        if isinstance(each, BaseExceptionGroup):
            waiting += each.exceptions
    return found
