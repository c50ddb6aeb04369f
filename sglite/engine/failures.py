"""From whatever was raised in a step to the error of the requests concerned."""

import traceback

from sglite.interface.errors import RequestError


def failed(what: str, error: BaseException) -> RequestError:
    """The error of a request that `error` has ended, which becomes its detached cause.

    Args:
        what: "the step", say.
        error: what was raised, once it has been caught.
    """
    failure = RequestError(f"{what} failed: {type(error).__name__}: {error}")
    failure.__cause__ = detach(error)
    return failure


def detach(error: BaseException) -> BaseException:
    """Makes notes of the tracebacks of an error and of those behind it; returns the error.

    A traceback holds its frames and those of all callers, with everything in their variables: the
    engine, its tensors, and the very requests whose error it is.
    """
    for each in _chain(error):
        if each.__traceback__ is not None:
            lines = traceback.format_tb(each.__traceback__)
            each.add_note("In the engine's thread (most recent call last):\n" + "".join(lines))
            each.__traceback__ = None
    return error


def let_go(error: BaseException) -> None:
    """Empties the frames of an error that is about to leave the library: what they hold may go."""
    for each in _chain(error):
        traceback.clear_frames(each.__traceback__)


def _chain(error: BaseException | None) -> list[BaseException]:
    """The error, what caused it, and so on."""
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found
