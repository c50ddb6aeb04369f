"""What a checkpoint's `generation_config.json` says: defaults of sampling, and end tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from sglite.interface import checks
from sglite.interface.errors import CheckpointError

__all__ = ["GenerationDefaults"]


@dataclass(frozen=True, kw_only=True)
class GenerationDefaults:
    """The values of sampling parameters that a caller leaves unset.

    The defaults of this class are the library's own; `from_generation_config` reads a file's.

    Attributes:
        temperature: at least 0 (0 is greedy).
        top_k: -1 keeps all tokens.
        top_p: in (0, 1].
        min_p: in [0, 1].
        repetition_penalty: above 0.
        max_new_tokens: cut to what fits in the context, since nobody asked for it.
        eos_token_ids: the end tokens that the file names; empty if it names none.
    """

    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_new_tokens: int = 128
    eos_token_ids: tuple[int, ...] = ()

    @classmethod
    def from_generation_config(cls, config: Mapping[str, Any] | None) -> GenerationDefaults:
        """Read the contents of `generation_config.json` (None if there is no such file).

        Only what the file itself says counts. Hugging Face's own defaults for what is absent
        (greedy, top-k 50) are not taken over, as vLLM and SGLang do not: an unset temperature
        is 1.0. A file that says `"do_sample": false` makes the default greedy, whatever
        temperature it holds besides.

        Raises:
            CheckpointError: a value of the file has the wrong type or lies outside its range.
        """
        given = {name: value for name, value in (config or {}).items() if value is not None}
        values = {
            name: check(name, given[name]) for name, check in _CHECKS.items() if name in given
        }
        if values.pop("do_sample", True) is False:
            values["temperature"] = 0.0
        if "eos_token_id" in values:
            values["eos_token_ids"] = values.pop("eos_token_id")
        return cls(**values)


def _error(message: str) -> CheckpointError:
    return CheckpointError(f"generation_config.json: {message}")


def _eos_token_ids(name: str, value: Any) -> tuple[int, ...]:
    return checks.token_ids(name, value if isinstance(value, list) else [value], error=_error)


def _top_k(name: str, value: Any) -> int:
    return checks.integer(name, value, minimum=-1, error=_error) or -1


_real = partial(checks.real, error=_error)

_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "temperature": partial(_real, minimum=0.0),
    "top_k": _top_k,
    "top_p": partial(_real, minimum=0.0, maximum=1.0, above=True),
    "min_p": partial(_real, minimum=0.0, maximum=1.0),
    "repetition_penalty": partial(_real, minimum=0.0, above=True),
    "max_new_tokens": partial(checks.integer, minimum=1, error=_error),
    "do_sample": partial(checks.boolean, error=_error),
    "eos_token_id": _eos_token_ids,
}
