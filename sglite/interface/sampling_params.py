"""How the tokens of a request are chosen, and when it ends.

`SamplingParams` is what a caller asks for. A parameter that the caller leaves unset is filled from
the checkpoint's `generation_config.json`, and else from the library, by `SamplingParams.resolve`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from sglite.interface import checks
from sglite.interface.errors import InvalidRequestError, suggest
from sglite.interface.foreign_names import advice_for_sampling
from sglite.interface.generation_defaults import GenerationDefaults

if TYPE_CHECKING:
    from torch import Tensor

    LogitsProcessor = Callable[[list[int], Tensor], Tensor]

__all__ = ["ALIASES", "PARAMETER_NAMES", "SamplingParams", "broadcast_sampling_params"]

#: Other spellings that are accepted, and what they are called here.
ALIASES = {
    "max_tokens": "max_new_tokens",
    "min_tokens": "min_new_tokens",
    "no_stop_trim": "include_stop_str_in_output",
}

#: Below this temperature sampling is greedy, as in vLLM: 1 / temperature leaves float32's range.
_GREEDY_BELOW = 1e-5


@dataclass(frozen=True, init=False, repr=False)
class SamplingParams:
    """What a caller asks of the sampling of one prompt. Immutable; checked where it is made.

    The order of work on a row of logits: penalties, bias and bans, temperature, top-k, top-p of
    what is left, min-p. Log-probabilities are of the model's own logits, before any of these.

    `None` means unset. The parameters marked (*) are then taken from `generation_config.json` if
    the checkpoint has them there, and else have the default given here.

    Args:
        max_new_tokens: how many tokens at most are generated, at least 1. Unset (*): 128, cut to
            what fits in the context. One that was asked for and cannot fit is refused.
            Also accepted as `max_tokens`.
        min_new_tokens: end tokens and `stop_token_ids` cannot be chosen before so many tokens
            are there (default 0). Also accepted as `min_tokens`.
        temperature: (*) the logits are divided by it; at least 0. 0 chooses the largest logit
            (greedy), as does anything below 1e-5. Default 1.0.
        top_k: (*) only so many of the largest logits stay; -1 or 0 keep all. Default -1.
        top_p: (*) of what top-k leaves, the smallest set of most probable tokens stays whose
            probabilities add up to at least top_p; in (0, 1]. Default 1.0.
        min_p: (*) only tokens stay whose probability is at least min_p times that of the most
            probable one; in [0, 1]. Default 0.0.
        frequency_penalty: `logit -= frequency_penalty * count` of the token in the generated
            text; in [-2, 2], default 0.0 (from the OpenAI API).
        presence_penalty: `logit -= presence_penalty` for tokens in the generated text; in
            [-2, 2], default 0.0 (from the OpenAI API).
        repetition_penalty: (*) logits of tokens in the prompt or the generated text are divided
            by it where positive and multiplied where negative; above 0, default 1.0 (CTRL,
            Keskar et al. 2019).
        n: how many completions are made of the prompt, at least 1. Default 1.
        seed: key of the random numbers, 0 to 2**64 - 1. The same seed gives the same tokens,
            alone and in any batch. Unset: drawn when the request is made, and reported.
        stop: a string or a list of strings; generation ends where the text holds one of them.
        stop_token_ids: token ids that end generation like the model's own end tokens.
        ignore_eos: go on after the model's own end tokens. Default False.
        skip_special_tokens: leave special tokens out of the text. Default True.
        include_stop_str_in_output: keep the stop string in the text. Default False. Also
            accepted as `no_stop_trim`.
        logit_bias: a dict from token id to a number that is added to the token's logit. The keys
            may be strings of digits, as JSON has them.
        bad_words: strings that may not be generated: the last token of each is banned where the
            tokens before it are there.
        allowed_token_ids: if given, all other tokens are banned.
        logprobs: for every generated token, return the log-probability of the chosen token and
            of this many most likely ones (0: the chosen token's only).
        prompt_logprobs: the same for the tokens of the prompt. The first token has none.
        prompt_logprobs_start: prompt log-probabilities are wanted from this position on
            (default 0). From there on the prefix cache is not read.
        logits_processors: a callable or a list of callables `f(token_ids, logits) -> logits`:
            `token_ids` is the list of ids generated so far, `logits` one row
            `[vocabulary]` of float32, which may be changed in place; the result has its shape.
        max_tokens: the same as `max_new_tokens`.
        min_tokens: the same as `min_new_tokens`.
        no_stop_trim: the same as `include_stop_str_in_output`.
        **others: refused by name, with the nearest known one.

    Lists become tuples, and `logit_bias` a read-only dict. Two objects with equal parameters are
    equal and hash alike.

    Raises:
        InvalidRequestError: a name is unknown or belongs to another library, a value has the
            wrong type or lies outside its range, or a parameter was given in two spellings.
    """

    max_new_tokens: int | None
    min_new_tokens: int
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    frequency_penalty: float
    presence_penalty: float
    repetition_penalty: float | None
    n: int
    seed: int | None
    stop: tuple[str, ...]
    stop_token_ids: tuple[int, ...]
    ignore_eos: bool
    skip_special_tokens: bool
    include_stop_str_in_output: bool
    logit_bias: Mapping[int, float]
    bad_words: tuple[str, ...]
    allowed_token_ids: tuple[int, ...] | None
    logprobs: int | None
    prompt_logprobs: int | None
    prompt_logprobs_start: int
    logits_processors: tuple[LogitsProcessor, ...]

    def __init__(
        self,
        /,
        *,
        max_new_tokens: int | None = None,
        min_new_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        frequency_penalty: float | None = None,
        presence_penalty: float | None = None,
        repetition_penalty: float | None = None,
        n: int | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        stop_token_ids: Sequence[int] | None = None,
        ignore_eos: bool | None = None,
        skip_special_tokens: bool | None = None,
        include_stop_str_in_output: bool | None = None,
        logit_bias: Mapping[int, float] | None = None,
        bad_words: str | Sequence[str] | None = None,
        allowed_token_ids: Sequence[int] | None = None,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
        prompt_logprobs_start: int | None = None,
        logits_processors: LogitsProcessor | Sequence[LogitsProcessor] | None = None,
        max_tokens: int | None = None,
        min_tokens: int | None = None,
        no_stop_trim: bool | None = None,
        **others: Any,
    ) -> None:
        given = dict(locals())
        del given["self"], given["others"]
        given = _with_own_names({**given, **others})
        for name, (default, check) in _PARAMETERS.items():
            value = given.get(name)
            object.__setattr__(self, name, default if value is None else check(name, value))
        self._check_together()

    def _check_together(self) -> None:
        if self.max_new_tokens is not None and self.min_new_tokens > self.max_new_tokens:
            checks.refuse(
                "min_new_tokens",
                self.min_new_tokens,
                f"at most max_new_tokens={self.max_new_tokens}",
            )
        if self.prompt_logprobs_start and self.prompt_logprobs is None:
            checks.refuse(
                "prompt_logprobs_start",
                self.prompt_logprobs_start,
                "0 where prompt_logprobs is not asked for",
            )

    @classmethod
    def make(
        cls, value: SamplingParams | Mapping[str, Any] | None = None, /, **keywords: Any
    ) -> SamplingParams:
        """Return sampling parameters from any form in which a caller may pass them.

        Args:
            value: a `SamplingParams`, a mapping of names to values, or None.
            **keywords: single parameters; they win over those of `value`.

        Raises:
            InvalidRequestError: as `SamplingParams` does, or `value` is something else.
        """
        if isinstance(value, cls) and not keywords:
            return value
        if value is None:
            given = {}
        elif isinstance(value, cls):
            given = value.to_dict()
        elif isinstance(value, Mapping):
            given = _with_own_names(value)
        else:
            checks.refuse("sampling_params", value, "a SamplingParams, a dict of them or None")
        return cls(**{**given, **_with_own_names(keywords)})

    def to_dict(self) -> dict[str, Any]:
        """Return the parameters that differ from an empty `SamplingParams()`, by name."""
        return {
            name: value
            for name, (default, _) in _PARAMETERS.items()
            if (value := getattr(self, name)) != default
        }

    def resolve(
        self,
        defaults: GenerationDefaults | Mapping[str, Any] | None = None,
        *,
        room: int | None = None,
    ) -> SamplingParams:
        """Return the same parameters with nothing left unset that sampling needs.

        Args:
            defaults: what the checkpoint says: a `GenerationDefaults`, the contents of
                `generation_config.json`, or None for the library's own defaults.
            room: how many tokens fit after the prompt. If given, an unset `max_new_tokens`
                becomes the default (or `min_new_tokens`, if that is more), cut to `room`, but
                at least 1. One that the caller set stays as it is, and without `room` an unset
                one stays None.

        In the result `temperature`, `top_k`, `top_p`, `min_p` and `repetition_penalty` are
        numbers. `temperature` is 0.0 (greedy) or at least 1e-5, and `top_k` is -1 (off) or at
        least 1.

        Raises:
            InvalidRequestError: `min_new_tokens` is above `room`.
            CheckpointError: `defaults` are the contents of a file, and wrong.
        """
        if not isinstance(defaults, GenerationDefaults):
            defaults = GenerationDefaults.from_generation_config(defaults)
        filled: dict[str, Any] = {
            name: getattr(defaults, name)
            for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
            if getattr(self, name) is None
        }
        if filled.get("temperature", self.temperature) < _GREEDY_BELOW:
            filled["temperature"] = 0.0
        if self.max_new_tokens is None and room is not None:
            if self.min_new_tokens > max(room, 0):
                allowed = f"at most {room}, the number of tokens that fit after the prompt"
                checks.refuse("min_new_tokens", self.min_new_tokens, allowed)
            wanted = max(defaults.max_new_tokens, self.min_new_tokens)
            filled["max_new_tokens"] = max(1, min(wanted, room))
        resolved = copy.copy(self)
        for name, value in filled.items():
            object.__setattr__(resolved, name, value)
        return resolved

    def check_vocabulary(self, vocab_size: int) -> None:
        """Check every token id and every count of tokens against a vocabulary of `vocab_size`.

        Raises:
            InvalidRequestError: naming the parameter, the id and the largest id there is.
        """
        ids = {
            "stop_token_ids": self.stop_token_ids,
            "allowed_token_ids": self.allowed_token_ids or (),
            "logit_bias": self.logit_bias,
        }
        for name, token_ids in ids.items():
            for token_id in token_ids:
                if token_id >= vocab_size:
                    raise InvalidRequestError(
                        f"{name} holds the token id {token_id}, but ids must be below "
                        f"{vocab_size}, the size of the vocabulary."
                    )
        for name in ("logprobs", "prompt_logprobs"):
            count = getattr(self, name)
            if count is not None and count > vocab_size:
                checks.refuse(name, count, f"at most {vocab_size}, the size of the vocabulary")

    def __repr__(self) -> str:
        given = ", ".join(f"{name}={value!r}" for name, value in self.to_dict().items())
        return f"SamplingParams({given})"


def broadcast_sampling_params(value: Any, count: int, /, **keywords: Any) -> list[SamplingParams]:
    """Return sampling parameters for each of `count` prompts.

    Args:
        value: one for all (a `SamplingParams`, a mapping or None), or a list with one of these
            for each prompt.
        count: the number of prompts.
        **keywords: single parameters for all prompts; they win over those of `value`.

    Raises:
        InvalidRequestError: the list has another length, or one of its entries is refused.
    """
    if not isinstance(value, list | tuple):
        return [SamplingParams.make(value, **keywords)] * count
    if len(value) != count:
        raise InvalidRequestError(
            f"sampling_params is a list of {len(value)}, but there are {count} prompts: give one "
            "for all, or a list with one for each prompt."
        )
    return [SamplingParams.make(item, **keywords) for item in value]


def _with_own_names(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return what was given under our own names, without what was left None."""
    own: dict[str, Any] = {}
    spelled: dict[str, str] = {}
    for spelling, value in given.items():
        name = ALIASES.get(spelling, spelling)
        if name not in _PARAMETERS:
            raise InvalidRequestError(_unknown(spelling))
        if value is None:
            continue
        if name in own and own[name] != value:
            raise InvalidRequestError(
                f"{spelled[name]}={own[name]!r} and {spelling}={value!r} are two names of one "
                "parameter with different values: give one of them."
            )
        own[name], spelled[name] = value, spelling
    return own


def _unknown(name: Any) -> str:
    if not isinstance(name, str):
        return f"{name!r} is no sampling parameter: the names are strings."
    advice = advice_for_sampling(name)
    if advice is not None:
        return f"The sampling parameter {name!r} does not exist here: {advice}."
    hint = suggest(name, (*PARAMETER_NAMES, "sampling_params", "progress"))
    return f"Unknown sampling parameter {name!r}.{hint} Known: {', '.join(PARAMETER_NAMES)}."


def _top_k(name: str, value: Any) -> int:
    return checks.integer(name, value, minimum=-1, hint="-1 and 0 keep all tokens") or -1


class _ReadOnlyDict(dict[int, float]):
    """A dict that cannot be changed, and therefore can be hashed."""

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise TypeError("sampling parameters cannot be changed; make new ones")

    __setitem__ = __delitem__ = __ior__ = _refuse
    clear = pop = popitem = setdefault = update = _refuse

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (dict(self),)


def _logit_bias(name: str, value: Any) -> Mapping[int, float]:
    if not isinstance(value, Mapping):
        checks.refuse(name, value, "a dict from token id to a number")
    bias = {}
    for key, number in value.items():
        as_number = int(key) if isinstance(key, str) and key.isdecimal() else key
        token_id = checks.token_id(f"key of {name}", as_number)
        if token_id in bias:
            checks.refuse(f"key of {name}", key, f"there once; {token_id} is there already")
        bias[token_id] = checks.real(f"{name}[{token_id}]", number, hint="-1e9 bans a token")
    return _ReadOnlyDict(bias)


def _allowed_token_ids(name: str, value: Any) -> tuple[int, ...]:
    ids = checks.token_ids(name, value)
    if not ids:
        checks.refuse(name, value, "a list of at least one token id, or None to allow all")
    return ids


def _logits_processors(name: str, value: Any) -> tuple[LogitsProcessor, ...]:
    processors = tuple(value) if isinstance(value, list | tuple) else (value,)
    for processor in processors:
        if not callable(processor):
            checks.refuse(name, value, "callables f(token_ids, logits) -> logits")
    return processors


#: For each parameter, its value where none is given, and the check of one that is.
_PARAMETERS: dict[str, tuple[Any, Callable[[str, Any], Any]]] = {
    "max_new_tokens": (None, partial(checks.integer, minimum=1)),
    "min_new_tokens": (0, partial(checks.integer, minimum=0)),
    "temperature": (None, partial(checks.real, minimum=0.0, hint="0 is greedy")),
    "top_k": (None, _top_k),
    "top_p": (None, partial(checks.real, minimum=0.0, maximum=1.0, above=True, hint="1 is off")),
    "min_p": (None, partial(checks.real, minimum=0.0, maximum=1.0, hint="0 is off")),
    "frequency_penalty": (0.0, partial(checks.real, minimum=-2.0, maximum=2.0, hint="0 is off")),
    "presence_penalty": (0.0, partial(checks.real, minimum=-2.0, maximum=2.0, hint="0 is off")),
    "repetition_penalty": (None, partial(checks.real, minimum=0.0, above=True, hint="1 is off")),
    "n": (1, partial(checks.integer, minimum=1)),
    "seed": (None, partial(checks.integer, minimum=0, maximum=checks.SEED_MAX)),
    "stop": ((), checks.strings),
    "stop_token_ids": ((), checks.token_ids),
    "ignore_eos": (False, checks.boolean),
    "skip_special_tokens": (True, checks.boolean),
    "include_stop_str_in_output": (False, checks.boolean),
    "logit_bias": (_ReadOnlyDict(), _logit_bias),
    "bad_words": ((), checks.strings),
    "allowed_token_ids": (None, _allowed_token_ids),
    "logprobs": (None, partial(checks.integer, minimum=0, hint="0 is the chosen token only")),
    "prompt_logprobs": (None, partial(checks.integer, minimum=0, hint="0 is the token's own only")),
    "prompt_logprobs_start": (0, partial(checks.integer, minimum=0)),
    "logits_processors": ((), _logits_processors),
}

PARAMETER_NAMES = tuple(_PARAMETERS)
