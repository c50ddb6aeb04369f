"""What can be generated from: text, token ids, and either with images.

`normalize_prompts` turns every form in which a caller may pass prompts into a list of `Prompt`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sglite.interface import checks
from sglite.interface.errors import InvalidRequestError, suggest
from sglite.interface.foreign_names import advice_for_prompt_key

__all__ = ["Prompt", "normalize_prompts"]

_TEXT_KEYS = ("text", "prompt")
_TOKEN_ID_KEYS = ("token_ids", "prompt_token_ids", "input_ids")
_KEYS = (*_TEXT_KEYS, *_TOKEN_ID_KEYS, "images")

_FORMS = "a string, a list of token ids, or a dict with 'text' or 'token_ids' and optional 'images'"


@dataclass(frozen=True)
class Prompt:
    """One prompt: either `text` or `token_ids`, and images.

    Attributes:
        text: the text, to which the tokenizer adds its special tokens; None if ids were given.
        token_ids: at least one token id, used as they are; None if text was given.
        images: the images in the order of their placeholders; empty for text alone.
    """

    text: str | None = None
    token_ids: tuple[int, ...] | None = None
    images: tuple[Any, ...] = ()


def normalize_prompts(prompts: Any) -> tuple[list[Prompt], bool]:
    """Return the prompts as a list, and whether a single one was given.

    A single prompt is a string, a list of token ids (Python's, numpy's or torch's integers; a
    one-dimensional array or tensor of integers), a dict with `text` (or `prompt`) or `token_ids`
    (or `prompt_token_ids`, `input_ids`) and optional `images`, or a `Prompt`. A list of these is
    a batch; the forms may be mixed. `[5, 6, 7]` is one prompt of three ids, and `[]` is an empty
    batch.

    Whether a text has at least one token, and whether the vocabulary has the ids, is checked
    where the text is tokenized.

    Raises:
        InvalidRequestError: naming the prompt (by its position in a batch), what is wrong with
            it, and what a prompt may be.
    """
    if isinstance(prompts, str | Mapping | Prompt):
        return [_one("prompt", prompts)], True
    items = _as_list("prompts", prompts)
    if items is None:
        checks.refuse("prompts", prompts, f"{_FORMS}, or a list of such prompts")
    if any(_is_number(item) for item in items):
        return [Prompt(token_ids=_token_ids("prompt", items))], True
    return [_one(f"prompts[{i}]", item) for i, item in enumerate(items)], False


def _one(name: str, value: Any) -> Prompt:
    """Return a single prompt; `name` says in messages which one it is."""
    if isinstance(value, Prompt):
        value = vars(value)  # made by the caller, so it is checked like a dict
    if isinstance(value, str):
        return Prompt(text=checks.text(name, value))
    if isinstance(value, Mapping):
        return _from_mapping(name, value)
    items = _as_list(name, value)
    if items is None:
        checks.refuse(name, value, _FORMS)
    return Prompt(token_ids=_token_ids(name, items))


def _from_mapping(name: str, value: Mapping[str, Any]) -> Prompt:
    for key in value:
        if key not in _KEYS:
            raise InvalidRequestError(_unknown_key(name, key))
    given = [key for key in (*_TEXT_KEYS, *_TOKEN_ID_KEYS) if value.get(key) is not None]
    if len(given) != 1:
        found = " and ".join(repr(key) for key in given) or "neither text nor token ids"
        raise InvalidRequestError(
            f"{name} has {found}: a prompt dict must have exactly one of {', '.join(_TEXT_KEYS)} "
            f"(a string) and {', '.join(_TOKEN_ID_KEYS)} (a list of token ids)."
        )
    (key,) = given
    images = _images(value.get("images"))
    if key in _TEXT_KEYS:
        return Prompt(text=checks.text(f"{name}[{key!r}]", value[key]), images=images)
    items = _as_list(f"{name}[{key!r}]", value[key])
    if items is None:
        checks.refuse(f"{name}[{key!r}]", value[key], "a list of token ids")
    return Prompt(token_ids=_token_ids(f"{name}[{key!r}]", items), images=images)


def _unknown_key(name: str, key: Any) -> str:
    advice = advice_for_prompt_key(key) if isinstance(key, str) else None
    if advice is not None:
        return f"{name} has the key {key!r}, which does not exist here: {advice}."
    hint = suggest(key, _KEYS) if isinstance(key, str) else ""
    return f"{name} has the unknown key {key!r}.{hint} Known: {', '.join(_KEYS)}."


def _images(value: Any) -> tuple[Any, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _as_list(name: str, value: Any) -> Sequence[Any] | None:
    """Return a list, tuple, other sequence or one-dimensional array as a sequence; else None."""
    if isinstance(value, str | bytes | bytearray | Mapping | Prompt):
        return None
    if hasattr(value, "tolist") and hasattr(value, "ndim"):
        if value.ndim != 1:
            raise InvalidRequestError(
                f"{name} is an array of {value.ndim} dimensions: a prompt is a one-dimensional "
                "array of token ids, and a batch is a list of prompts, each without padding."
            )
        return value.tolist()
    return value if isinstance(value, Sequence) else None


def _is_number(value: Any) -> bool:
    """Say whether an item is, or was meant as, a token id rather than a prompt of its own."""
    if isinstance(value, int | float):
        return True
    return checks.as_index(value) is not None or checks.as_float(value) is not None


def _token_ids(name: str, items: Sequence[Any]) -> tuple[int, ...]:
    if not items:
        raise InvalidRequestError(f"{name} is a prompt with no token at all: give at least one id.")
    # The common case, a list of plain integers, takes no Python step per token.
    if set(map(type, items)) == {int} and min(items) >= 0 and max(items) <= checks.TOKEN_ID_MAX:
        return tuple(items)
    for item in items:
        if isinstance(item, str | Mapping | Sequence):
            raise InvalidRequestError(
                f"{name} mixes token ids with {checks.shorten(item)}: in a list of prompts, a "
                "prompt of token ids is a list of its own, [[5, 6], 'text']."
            )
    return checks.token_ids(name, items)
