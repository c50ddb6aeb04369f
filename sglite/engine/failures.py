"""From whatever was raised in a step to the error of the requests concerned."""

import traceback

from sglite.interface.errors import RequestError


def failed(what: str, error: BaseException) -> RequestError:
    """The error of a request that `error` has ended, which becomes its cause.

    To be called where the error has been caught. The cause's traceback stays readable, but holds
    no tensor, request or engine alive.

    Args:
        what: "the step", say.
        error: what was raised.
    """
    failure = RequestError(f"{what} failed: {type(error).__name__}: {error}")
    failure.__cause__ = error
    let_go(error)
    if error.__traceback__ is not None:
        # The first frame is the caller's, which is still at work and cannot be emptied.
        error.__traceback__ = error.__traceback__.tb_next
    return failure


def let_go(error: BaseException | None) -> None:
    """Empties the frames of an error and its causes: whatever their variables hold may go."""
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
