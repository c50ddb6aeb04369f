"""The errors that sglite raises, and the helper that words "did you mean".

All of them derive from `SGLiteError`. Those that a caller makes by passing something wrong are
`ValueError`s as well, and are raised before anything is computed.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sglite.interface.outputs import RequestOutput

__all__ = [
    "CheckpointError",
    "ConfigError",
    "EngineClosedError",
    "GenerationError",
    "InvalidRequestError",
    "MissingPackageError",
    "OutOfMemoryError",
    "RequestError",
    "SGLiteError",
    "UnsupportedModelError",
    "foreign_errors_as",
    "suggest",
]


class SGLiteError(Exception):
    """The base of every error that sglite raises on purpose."""


class ConfigError(SGLiteError, ValueError):
    """An argument of `LLM(...)` has a wrong name, type or value."""


class CheckpointError(SGLiteError):
    """A checkpoint cannot be read: the message names the file or the tensor, and what is wrong."""


class UnsupportedModelError(CheckpointError):
    """A checkpoint is sound, but something in it (an architecture, a kind) is not implemented."""


class MissingPackageError(SGLiteError, ImportError):
    """A tool needs a package that is not installed: the message says how to install it."""


class InvalidRequestError(SGLiteError, ValueError):
    """A prompt or a sampling parameter is refused, before anything is computed."""


class RequestError(SGLiteError):
    """One running request failed (a logits processor raised, logits hold NaN, ...).

    It stands in `.error` of the failed output; the call raises a `GenerationError`.
    """


class EngineClosedError(SGLiteError):
    """The `LLM` was used after `close()`, after its `with` block, or in a fork of its process."""


class OutOfMemoryError(SGLiteError, MemoryError):
    """Weights or KV cache do not fit: the message says what is needed, and what to change."""


@contextmanager
def foreign_errors_as(kind: type[SGLiteError], what: str) -> Iterator[None]:
    """Has whatever a model's or a library's own code raises become an error of ours.

    Args:
        kind: of error.
        what: begins the message; the kind and the text of what was raised follow.
    """
    try:
        yield
    except SGLiteError:
        raise
    except Exception as error:
        raise kind(f"{what}: {type(error).__name__}: {error}") from error


class GenerationError(SGLiteError):
    """At least one prompt of a call failed; raised when all the others have finished.

    Attributes:
        outputs: every output of the call in the order asked, the failed ones with `.error` set.

    The first failure is the error's `__cause__`.
    """

    outputs: list[RequestOutput]

    def __init__(self, outputs: Sequence[RequestOutput]) -> None:
        self.outputs = list(outputs)
        failed = [(i, out.error) for i, out in enumerate(self.outputs) if out.error is not None]
        if not failed:
            raise ValueError("outputs must hold at least one output with an error")
        lines = [f"{len(failed)} of {len(self.outputs)} prompts failed (.outputs has them all):"]
        lines += [f"  prompt {i}: {_describe(error)}" for i, error in failed[:_FAILURES_SHOWN]]
        if len(failed) > _FAILURES_SHOWN:
            lines.append(f"  and {len(failed) - _FAILURES_SHOWN} more")
        super().__init__("\n".join(lines))
        self.__cause__ = failed[0][1]

    def __reduce__(self) -> tuple[type[GenerationError], tuple[list[RequestOutput]]]:
        return type(self), (self.outputs,)


_FAILURES_SHOWN = 5


def _describe(error: BaseException) -> str:
    """Words of an error for one line of a list; the type only where it is not one of ours."""
    if isinstance(error, SGLiteError):
        return str(error)
    return f"{type(error).__name__}: {error}"


def suggest(name: str, known: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the name in `known` that is nearest to `name`, or "".

    The result is made to follow a full stop, so that a message reads well with and without it.
    """
    nearest = difflib.get_close_matches(name.lower(), list(known), n=1, cutoff=0.6)
    return f" Did you mean {nearest[0]!r}?" if nearest else ""
