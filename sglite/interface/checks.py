"""Checks of single values, shared by sampling parameters, prompts and options.

Each takes the argument's name and its value, returns the value in its plain Python type, and
raises an error that names the argument, the value and what is allowed.
"""

from __future__ import annotations

import numbers
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn

from sglite.interface.errors import InvalidRequestError, SGLiteError

#: Makes the error to raise from its message: an error class, or a function that adds words.
ErrorMaker = Callable[[str], SGLiteError]

#: Every real parameter reaches the kernels as a 32-bit float.
FLOAT32_MAX = 3.4028234663852886e38
#: Token ids are 32-bit integers in the kernels.
TOKEN_ID_MAX = 2**31 - 1
#: The counter behind the random numbers is keyed with 64 bits.
SEED_MAX = 2**64 - 1

_SHOWN = 60


def shorten(value: Any) -> str:
    """Return `repr(value)`, cut to 60 characters."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def refuse(
    name: str, value: Any, allowed: str, error: ErrorMaker = InvalidRequestError
) -> NoReturn:
    """Raise `error`, saying that argument `name` is `value` and must be `allowed`."""
    raise error(f"{name}={shorten(value)} is not allowed: {name} must be {allowed}.")


def boolean(name: str, value: Any, *, error: ErrorMaker = InvalidRequestError) -> bool:
    """Return `value` if it is a bool; 0, 1 and strings are refused."""
    if not isinstance(value, bool):
        refuse(name, value, "True or False", error)
    return value


def integer(
    name: str,
    value: Any,
    *,
    minimum: int,
    maximum: int | None = None,
    hint: str = "",
    error: ErrorMaker = InvalidRequestError,
) -> int:
    """Return `value` as an int within [minimum, maximum]; bools, floats and strings are refused."""
    result = as_index(value)
    if result is None or result < minimum or (maximum is not None and result > maximum):
        allowed = f"of at least {minimum}" if maximum is None else f"in [{minimum}, {maximum}]"
        refuse(name, value, f"an integer {allowed}{hint and f' ({hint})'}", error)
    return result


def real(
    name: str,
    value: Any,
    *,
    minimum: float = -FLOAT32_MAX,
    maximum: float = FLOAT32_MAX,
    above: bool = False,
    below: bool = False,
    hint: str = "",
    error: ErrorMaker = InvalidRequestError,
) -> float:
    """Return `value` as a float within the range; NaN, infinities and bools are refused.

    Args:
        name: the argument's name, for the message.
        value: what was given.
        minimum: the smallest value allowed; `above` leaves it out itself.
        maximum: the largest value allowed; `below` leaves it out itself.
        above: whether the value must lie above `minimum`.
        below: whether the value must lie below `maximum`.
        hint: words for the message, in brackets after the range.
        error: makes the error to raise from its message.
    """
    number = as_float(value)
    # NaN compares false, and infinities lie outside of float32's range, which bounds all others.
    outside = (
        number is None
        or not minimum <= number <= maximum
        or (above and number == minimum)
        or (below and number == maximum)
    )
    if outside:
        allowed = _range(minimum, maximum, above, below)
        refuse(name, value, f"a finite number{allowed}{hint and f' ({hint})'}", error)
    return number


def _range(minimum: float, maximum: float, above: bool, below: bool) -> str:
    if minimum == -FLOAT32_MAX and maximum == FLOAT32_MAX:
        return ""
    if maximum == FLOAT32_MAX:
        return f" above {minimum:g}" if above else f" of at least {minimum:g}"
    return f" in {'(' if above else '['}{minimum:g}, {maximum:g}{')' if below else ']'}"


def as_index(value: Any) -> int | None:
    """Return `value` as an int if it is an integer of any library, but no bool; else None."""
    if isinstance(value, bool) or not hasattr(type(value), "__index__"):
        return None
    if getattr(value, "ndim", 0):  # a tensor with one element would pass for its element
        return None
    try:
        return operator.index(value)
    except TypeError:  # a tensor of another dtype
        return None


def as_float(value: Any) -> float | None:
    """Return `value` as a float if it is a real number of any library, but no bool; else None."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    try:
        return float(value)
    except OverflowError:
        return None


def text(name: str, value: Any, *, error: ErrorMaker = InvalidRequestError) -> str:
    """Return `value` if it is a string that can be written as UTF-8."""
    if not isinstance(value, str):
        refuse(name, value, "a string", error)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as problem:
        raise error(
            f"{name}={shorten(value)} is not allowed: character {problem.start} is "
            f"{value[problem.start]!r}, half of a surrogate pair, and no text can hold it."
        ) from None
    return value


def strings(name: str, value: Any) -> tuple[str, ...]:
    """Return one string, or a list of them, as a tuple; empty strings are refused."""
    items = (value,) if isinstance(value, str) else _items(value)
    if items is None:
        refuse(name, value, "a string or a list of strings")
    for item in items:
        if not isinstance(item, str) or not item:
            refuse(name, value, f"strings of at least one character, not {shorten(item)}")
        text(name, item)
    return items


def token_id(name: str, value: Any, *, error: ErrorMaker = InvalidRequestError) -> int:
    """Return `value` as a token id. Whether the vocabulary has it is checked by the engine."""
    result = as_index(value)
    if result is None or not 0 <= result <= TOKEN_ID_MAX:
        refuse(name, value, f"a token id, an integer in [0, {TOKEN_ID_MAX}]", error)
    return result


def token_ids(name: str, value: Any, *, error: ErrorMaker = InvalidRequestError) -> tuple[int, ...]:
    """Return a list (tuple, set, array) of token ids as a tuple."""
    items = _items(value)
    if items is None:
        refuse(name, value, "a list of token ids", error)
    return tuple(token_id(f"{name}[{i}]", item, error=error) for i, item in enumerate(items))


def _items(value: Any) -> tuple[Any, ...] | None:
    """Return the items of a list-like value, or None; sets in order, so that equal sets agree."""
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        return None
    if isinstance(value, set | frozenset):
        return tuple(sorted(value, key=lambda item: (str(type(item)), item)))
    if hasattr(value, "tolist"):
        value = value.tolist()
        return tuple(value) if isinstance(value, list) else None
    return tuple(value)
