"""What generation gives back.

`RequestOutput` belongs to one prompt and holds a `CompletionOutput` for each of its `n`
completions; `StreamChunk` is a piece of one completion. The names are those of vLLM
(`out.outputs[0].text`), and SGLang's keys work as well (`out["text"]`, `out["meta_info"]`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from sglite.interface.checks import shorten
from sglite.interface.errors import suggest

__all__ = [
    "CompletionOutput",
    "FinishReason",
    "Logprob",
    "RequestOutput",
    "StreamChunk",
    "TokenLogprobs",
    "Usage",
]

#: Why a completion ended: an end token, stop token or stop string; `max_new_tokens` or the end of
#: the context; the caller left; the request failed (see its `.error`).
FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True, slots=True)
class Logprob:
    """The log-probability of one token at one position, from the model's own logits.

    Attributes:
        logprob: natural logarithm of the token's probability.
        rank: 1 for the most probable token of the vocabulary, and so on.
        decoded_token: the token as text; "" if it is part of a character, or no token of the
            tokenizer.
    """

    logprob: float
    rank: int
    decoded_token: str


#: The log-probabilities at one position, by token id: those of the most probable tokens that were
#: asked for, and always that of the token which stands there.
TokenLogprobs = dict[int, Logprob]


@dataclass(frozen=True, slots=True)
class Usage:
    """How much a request took.

    Attributes:
        prompt_tokens: tokens of the prompt.
        cached_tokens: how many of them were read from the prefix cache.
        completion_tokens: generated tokens, summed over the completions.
        time_to_first_token: seconds from the call, before anything of it is read, to the first
            token; None if there was none.
        latency: seconds from the call to the last token; None while the request runs.
        finish_reason: why the first completion ended; None while it runs.
    """

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    time_to_first_token: float | None = None
    latency: float | None = None
    finish_reason: FinishReason | None = None

    @property
    def total_tokens(self) -> int:
        """Tokens of the prompt and of all completions."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, kw_only=True, repr=False)
class CompletionOutput:
    """One completion of a prompt.

    Attributes:
        index: which of the prompt's `n` completions this is.
        text: the generated text, up to the stop string if one ended it.
        token_ids: every generated token, the end token included.
        logprobs: for each token of `token_ids` its `TokenLogprobs`; None if not asked for.
        finish_reason: "stop", "length", "abort" or "error"; None while it runs.
        stop_reason: the stop string or the id of the stop token that ended it; None if the
            model's own end token did, or nothing of the kind.
        cumulative_logprob: sum of the chosen tokens' log-probabilities; None if `logprobs` were
            not asked for.
        seed: the key of its random numbers, drawn or given.
        error: what failed, if `finish_reason` is "error".
    """

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    cumulative_logprob: float | None = None
    seed: int | None = None
    error: Exception | None = None

    def __repr__(self) -> str:
        end = f", error={self.error!r}" if self.error else ""
        return (
            f"CompletionOutput(index={self.index}, text={shorten(self.text)}, "
            f"{len(self.token_ids)} tokens, finish_reason={self.finish_reason!r}{end})"
        )


class _Keyed:
    """Gives an output SGLang's keys: `out["text"]`, `"text" in out`, `dict(out)`."""

    _KEYS: ClassVar[dict[str, str]]
    #: Else Python would try `out[0]`, `out[1]`, ... where someone writes `for x in out`.
    __iter__ = None

    def keys(self) -> tuple[str, ...]:
        """Return the keys that can be written in square brackets."""
        return tuple(self._KEYS)

    def __contains__(self, key: object) -> bool:
        return key in self._KEYS

    def __getitem__(self, key: str) -> Any:
        name = type(self).__name__
        if not isinstance(key, str):
            raise TypeError(
                f"{name} is no list, so [{key!r}] finds nothing: a single prompt gives a single "
                f"{name}, a list of prompts gives a list."
            )
        if key not in self._KEYS:
            hint = suggest(key, self._KEYS)
            raise KeyError(f"{name} has no key {key!r}.{hint} Known: {', '.join(self._KEYS)}.")
        return getattr(self, self._KEYS[key])


@dataclass(frozen=True, kw_only=True, repr=False)
class RequestOutput(_Keyed):
    """What one prompt gave.

    Attributes:
        request_id: the engine's name of the request.
        prompt: the prompt's text; None if it was given as token ids.
        prompt_token_ids: the prompt's tokens, special tokens included.
        outputs: the completions, at least one, in the order of their index.
        usage: counts of tokens and times.
        prompt_logprobs: for each token of the prompt its `TokenLogprobs`; None for the first
            token and for those before `prompt_logprobs_start`. None if not asked for.

    `text`, `token_ids`, `logprobs` and `finish_reason` are those of the first completion. The
    keys `out["text"]`, `out["output_ids"]` and `out["meta_info"]` are SGLang's.
    """

    _KEYS: ClassVar = {"text": "text", "output_ids": "token_ids", "meta_info": "meta_info"}

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    usage: Usage
    prompt_logprobs: list[TokenLogprobs | None] | None = None

    def __post_init__(self) -> None:
        if not self.outputs:
            raise ValueError("outputs=[] is not allowed: a RequestOutput has a completion")

    @property
    def text(self) -> str:
        """The generated text of the first completion."""
        return self.outputs[0].text

    @property
    def token_ids(self) -> list[int]:
        """The generated tokens of the first completion."""
        return self.outputs[0].token_ids

    @property
    def logprobs(self) -> list[TokenLogprobs] | None:
        """The log-probabilities of the first completion."""
        return self.outputs[0].logprobs

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the first completion ended; None while it runs."""
        return self.outputs[0].finish_reason

    @property
    def finished(self) -> bool:
        """Whether every completion has ended."""
        return all(completion.finish_reason is not None for completion in self.outputs)

    @property
    def error(self) -> Exception | None:
        """The first error among the completions, or None."""
        return next((c.error for c in self.outputs if c.error is not None), None)

    @property
    def meta_info(self) -> dict[str, Any]:
        """SGLang's dict about the request, with its keys and the shapes of its values.

        `id`, `prompt_tokens`, `cached_tokens`, `completion_tokens`, `e2e_latency` (seconds),
        `time_to_first_token` (seconds), `finish_reason` (a dict with `type`, or None), `seed`;
        and where they were asked for `output_token_logprobs` and `input_token_logprobs`: for
        each token a tuple of log-probability, id and text.
        """
        first, usage = self.outputs[0], self.usage
        info: dict[str, Any] = {
            "id": self.request_id,
            "prompt_tokens": usage.prompt_tokens,
            "cached_tokens": usage.cached_tokens,
            "completion_tokens": usage.completion_tokens,
            "e2e_latency": usage.latency,
            "time_to_first_token": usage.time_to_first_token,
            "finish_reason": _finish_reason_dict(first),
            "seed": first.seed,
        }
        if first.logprobs is not None:
            info["output_token_logprobs"] = _chosen(first.token_ids, first.logprobs)
        if self.prompt_logprobs is not None:
            info["input_token_logprobs"] = _chosen(self.prompt_token_ids, self.prompt_logprobs)
        return info

    def __repr__(self) -> str:
        count = f", {len(self.outputs)} completions" if len(self.outputs) > 1 else ""
        end = f", error={self.error!r}" if self.error else ""
        return (
            f"RequestOutput(text={shorten(self.text)}, finish_reason={self.finish_reason!r}, "
            f"prompt_tokens={self.usage.prompt_tokens}, "
            f"completion_tokens={self.usage.completion_tokens}{count}{end})"
        )


def _finish_reason_dict(completion: CompletionOutput) -> dict[str, Any] | None:
    """Return a finish reason in SGLang's form, a dict with `type` and what belongs to it."""
    reason = completion.finish_reason
    if reason is None:
        return None
    if reason == "stop":
        last = completion.token_ids[-1] if completion.token_ids else None
        matched = last if completion.stop_reason is None else completion.stop_reason
        return {"type": reason, "matched": matched}
    if reason == "length":
        return {"type": reason, "length": len(completion.token_ids)}
    return {"type": reason, "message": str(completion.error or "")}


def _chosen(
    token_ids: list[int], logprobs: list[TokenLogprobs | None] | list[TokenLogprobs]
) -> list[tuple[float | None, int, str | None]]:
    """Return (log-probability, id, text) for the token that stands at each position."""
    entries = []
    for token_id, position in zip(token_ids, logprobs, strict=True):
        if position is None:
            entries.append((None, token_id, None))
        else:
            entries.append((position[token_id].logprob, token_id, position[token_id].decoded_token))
    return entries


@dataclass(frozen=True, kw_only=True, repr=False)
class StreamChunk(_Keyed):
    """A piece of one completion. The texts of a completion's chunks add up to exactly its text.

    Attributes:
        index: the prompt's position in the list that was passed; 0 for a single prompt.
        completion_index: which of the prompt's `n` completions the piece belongs to.
        text: the new text; "" while bytes wait that are no UTF-8 yet, or a possible stop string.
        token_ids: the new tokens; those whose text waits are here already.
        logprobs: for each of the new tokens its `TokenLogprobs`; None if not asked for.
        finish_reason: why the completion ended, in its last chunk; else None.
        stop_reason: as in `CompletionOutput`, in the completion's last chunk.
        error: what failed, if `finish_reason` is "error".
        output: in the prompt's very last chunk the `RequestOutput` that `generate` would give.

    `chunk["text"]`, `chunk["output_ids"]`, `chunk["index"]` and `chunk["finish_reason"]` work as
    well. Unlike SGLang's, a chunk's text is the new piece alone, not everything so far.
    """

    _KEYS: ClassVar = {
        "text": "text",
        "output_ids": "token_ids",
        "index": "index",
        "finish_reason": "finish_reason",
    }

    index: int
    text: str
    token_ids: list[int]
    completion_index: int = 0
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    error: Exception | None = None
    output: RequestOutput | None = field(default=None, compare=False)

    @property
    def finished(self) -> bool:
        """Whether this is the last chunk of its completion."""
        return self.finish_reason is not None

    def __repr__(self) -> str:
        end = f", finish_reason={self.finish_reason!r}" if self.finished else ""
        return f"StreamChunk(index={self.index}, text={shorten(self.text)}{end})"
