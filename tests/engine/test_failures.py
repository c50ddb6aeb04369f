"""Errors of any kind become the errors of requests, and let go of what they hold."""

import dataclasses
import weakref

import pytest

from sglite.engine.failures import detach, errors_behind, failed, report


class Thing:
    """Something that a frame holds."""


def raised(error):
    """An error that has been raised, and a weak reference to what its frame holds."""
    thing = Thing()
    try:
        raise error
    except BaseException as caught:
        return caught, weakref.ref(thing)


class UnprintableError(Exception):
    def __str__(self):
        raise KeyError("no text")


class UnequalError(Exception):
    def __eq__(self, other):
        raise ValueError("no comparison")

    def __bool__(self):
        raise ValueError("no truth")

    __hash__ = None


@dataclasses.dataclass(frozen=True)
class FrozenError(Exception):
    number: int


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ValueError("planted"), "ValueError: planted"),
        (UnprintableError(), "UnprintableError, which cannot be printed"),
        (UnequalError("planted"), "UnequalError: planted"),
        (FrozenError(3), "FrozenError: "),
        (SystemExit(3), "SystemExit: 3"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_whatever_was_raised(error, words):
    caught, held = raised(error)
    failure = failed("the step", caught)
    assert str(failure).startswith(f"the step failed: {words}")
    assert failure.__cause__ is error
    assert error.__traceback__ is None
    assert held() is None


def test_all_errors_behind_an_error_let_go():
    held = []

    def fail(error, cause=None):
        thing = Thing()
        held.append(weakref.ref(thing))
        raise error from cause

    def chain():
        try:
            try:
                fail(ValueError("first"))
            except ValueError:
                fail(UnequalError("second"))
        except UnequalError as second:
            try:
                fail(OSError("elsewhere"))
            except OSError as elsewhere:
                cause = elsewhere
            fail(ExceptionGroup("all", [KeyError("a"), second]), cause)

    def caught():
        try:
            chain()
        except ExceptionGroup as group:
            return group

    group = caught()
    kinds = sorted(type(error).__name__ for error in errors_behind(group))
    assert kinds == ["ExceptionGroup", "KeyError", "OSError", "UnequalError", "ValueError"]
    assert all(reference() is not None for reference in held)
    detach(group)
    assert [reference() for reference in held] == [None] * 4


def test_an_error_that_is_raised_again_and_again_has_one_note():
    error = ValueError("one object")
    error.add_note("the model's own")
    for _ in range(5):
        detach(raised(error)[0])
    assert len(error.__notes__) == 2
    assert error.__notes__[0] == "the model's own"
    assert "in raised" in error.__notes__[1]


def test_what_a_log_raises_ends_there():
    def log(*arguments, **keywords):
        raise KeyboardInterrupt

    report(log, "a message", error=ValueError())
