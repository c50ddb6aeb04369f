"""Exceptions planted in the library's own code, anywhere in it."""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import sglite

_PACKAGE = Path(sglite.__file__).parent
_PLACES = tuple(str(_PACKAGE / folder) for folder in ("engine", "cache"))
# What stands around the rest, so that nothing is left to catch what it raises.
_OUTERMOST = "_run"


class Planted(BaseException):
    """Like one of Rust's panics no `Exception`."""


class Fault:
    """Raises once, when the engine's thread reaches a line of the engine or the cache.

    Args:
        at: the number of lines after which.

    Attributes:
        where: file and line, once it has raised.
        num_lines: how many lines have been run.
    """

    def __init__(self, at: int):
        self.where: str | None = None
        self.num_lines = 0
        self._at = at

    @contextmanager
    def planted(self) -> Iterator["Fault"]:
        """For threads that begin within this block."""
        threading.settrace(self._enter)
        try:
            yield self
        finally:
            threading.settrace(None)  # type: ignore[arg-type]

    def _enter(self, frame: FrameType, event: str, argument: object):
        if threading.current_thread().name != "sglite-driver":
            sys.settrace(None)
            return None
        is_ours = frame.f_code.co_filename.startswith(_PLACES)
        return self._line if is_ours and frame.f_code.co_name != _OUTERMOST else None

    def _line(self, frame: FrameType, event: str, argument: object):
        if event == "line":
            self.num_lines += 1
            if self.num_lines == self._at:
                self.where = f"{frame.f_code.co_filename}:{frame.f_lineno}"
                raise Planted(f"planted at line {self._at}, {self.where}")
        return self._line
