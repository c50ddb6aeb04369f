"""What can be generated from: text, token ids, and either with images and videos.

`normalize_prompts` turns every form in which a caller may pass prompts into a list of `Prompt`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sglite.interface import checks
from sglite.interface.errors import InvalidRequestError, suggest
from sglite.interface.foreign_names import advice_for_prompt_key

__all__ = ["Prompt", "normalize_prompts"]

_TEXT_KEYS = ("text", "prompt")
_TOKEN_ID_KEYS = ("token_ids", "prompt_token_ids", "input_ids")
_ENTRIES = {"images": "an image, a list of images, or None", "videos": "a list of videos, or None"}
_MEDIA_KEYS = tuple(_ENTRIES)
_KEYS = (*_TEXT_KEYS, *_TOKEN_ID_KEYS, *_MEDIA_KEYS)

_FORMS = (
    "a string, a list of token ids, or a dict with 'text' or 'token_ids' and optional 'images' and "
    "'videos'"
)


@dataclass(frozen=True)
class Prompt:
    """One prompt: what a caller may pass has either `text` or `token_ids`; and images.

    Attributes:
        text: the text, to which the tokenizer adds its special tokens; None if ids were given.
            Beside `token_ids`, as a conversation's prompt has both, it is only what is reported.
        token_ids: at least one token id, used as they are; None if text alone was given.
        images: the images in the order of their placeholders; empty for text alone.
        videos: the videos in the order of their placeholders, each a list of frames, or a dict
            with `frames` and `fps`.
    """

    text: str | None = None
    token_ids: tuple[int, ...] | None = None
    images: tuple[Any, ...] = ()
    videos: tuple[Any, ...] = ()


def normalize_prompts(
    prompts: Any, *, images: Any = None, videos: Any = None
) -> tuple[list[Prompt], bool]:
    """Return the prompts as a list, and whether a single one was given.

    A single prompt is a string, a list of token ids (Python's, numpy's or torch's integers; a
    one-dimensional array or tensor of integers), a dict with `text` (or `prompt`) or `token_ids`
    (or `prompt_token_ids`, `input_ids`) and optional `images`, or a `Prompt`. A list of these is
    a batch; the forms may be mixed. `[5, 6, 7]` is one prompt of three ids, and `[]` is an empty
    batch.

    Whether a text has at least one token, and whether the vocabulary has the ids, is checked
    where the text is tokenized; what an image is, where it is read.

    Args:
        prompts: what the caller passed.
        images: for a single prompt its image or a list of them; for a batch a list with an image,
            a list of images or None for each prompt. Prompts have them here or in their dict.
        videos: likewise; a video is a list of frames, so that those of a prompt are always a list
            of videos; or a dict with `frames` and `fps`, frames per second.

    Raises:
        InvalidRequestError: naming the prompt (by its position in a batch), what is wrong with
            it, and what a prompt may be.
    """
    normalized, is_single = _normalize(prompts)
    for name, given in (("images", images), ("videos", videos)):
        if given is not None:
            normalized = _with_media(normalized, is_single, name, given)
    return normalized, is_single


def _normalize(prompts: Any) -> tuple[list[Prompt], bool]:
    if isinstance(prompts, str | Mapping | Prompt):
        return [_one("prompt", prompts)], True
    items = _as_list("prompts", prompts)
    if items is None:
        checks.refuse("prompts", prompts, f"{_FORMS}, or a list of such prompts")
    if any(_is_number(item) for item in items):
        return [Prompt(token_ids=_token_ids("prompt", items))], True
    return [_one(f"prompts[{i}]", item) for i, item in enumerate(items)], False


def _with_media(prompts: list[Prompt], is_single: bool, name: str, given: Any) -> list[Prompt]:
    """The prompts with the images or videos of the argument `name`."""
    if is_single:
        given = [given]
    elif not isinstance(given, list | tuple) or len(given) != len(prompts):
        checks.refuse(
            name, given, f"a list of {len(prompts)} entries, one for each prompt: {_ENTRIES[name]}"
        )
    result = []
    for index, (prompt, entry) in enumerate(zip(prompts, given, strict=True)):
        found = _media(name, entry)
        if found and getattr(prompt, name):
            prefix = "the prompt" if is_single else f"prompts[{index}]"
            raise InvalidRequestError(
                f"{prefix} has {name} of its own, and {name}= gives more: use one of the two."
            )
        result.append(replace(prompt, **{name: found}) if found else prompt)
    return result


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
    media = {kind: _media(kind, value.get(kind)) for kind in _MEDIA_KEYS}
    if key in _TEXT_KEYS:
        return Prompt(text=checks.text(f"{name}[{key!r}]", value[key]), **media)
    items = _as_list(f"{name}[{key!r}]", value[key])
    if items is None:
        checks.refuse(f"{name}[{key!r}]", value[key], "a list of token ids")
    return Prompt(token_ids=_token_ids(f"{name}[{key!r}]", items), **media)


def _unknown_key(name: str, key: Any) -> str:
    advice = advice_for_prompt_key(key) if isinstance(key, str) else None
    if advice is not None:
        return f"{name} has the key {key!r}, which does not exist here: {advice}."
    hint = suggest(key, _KEYS) if isinstance(key, str) else ""
    return f"{name} has the unknown key {key!r}.{hint} Known: {', '.join(_KEYS)}."


def _media(name: str, value: Any) -> tuple[Any, ...]:
    """The images or videos of one prompt; a single image may stand for itself."""
    if value is None:
        return ()
    if isinstance(value, list | tuple):
        return tuple(value)
    if name == "videos" and not isinstance(value, Mapping):
        allowed = "a list of videos, each a list of frames or a dict with 'frames' and 'fps'"
        checks.refuse(name, value, allowed)
    return (value,)


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
