"""When a sequence ends of itself: end tokens, stop tokens, stop strings; and the text it has."""

from collections.abc import Iterable, Sequence
from typing import Protocol

from sglite.interface.sampling_params import SamplingParams


class Detokenizer(Protocol):
    """Text of a growing sequence, in pieces; see `sglite.engine.tokenizer`."""

    def add(self, token_id: int) -> str:
        """Takes a token and returns the text that is now certain."""

    def flush(self) -> str:
        """Returns what is left, with replacement characters for bytes that are no UTF-8."""


class StopChecker:
    """Watches one sequence for its end, and keeps its text where somebody has to see it grow.

    Text is kept only with a detokenizer, which is given where there are stop strings or a stream.

    Attributes:
        ending_token_ids: the ids that end the sequence, banned until `min_new_tokens` are there.
        stopped: whether the sequence has ended.
        text: what may be shown, without the stop string unless it was asked to stay.
    """

    # As those of `Request`.
    __slots__ = (
        "_detokenizer",
        "_keep",
        "_min_tokens",
        "_num_tokens",
        "_raw_text",
        "_stop_ids",
        "_stop_strings",
        "ending_token_ids",
        "stopped",
        "text",
    )

    def __init__(
        self,
        params: SamplingParams,
        *,
        end_token_ids: Iterable[int] = (),
        detokenizer: Detokenizer | None = None,
    ):
        self._stop_ids = frozenset(params.stop_token_ids)
        end_ids = frozenset(() if params.ignore_eos else end_token_ids)
        # Where it can be, one set of all requests, which then stays in the processor's caches.
        self.ending_token_ids = end_ids | self._stop_ids if self._stop_ids else end_ids
        self._stop_strings: Sequence[str] = params.stop
        self._keep = params.include_stop_str_in_output
        self._detokenizer = detokenizer
        self._min_tokens = params.min_new_tokens
        self._num_tokens = 0
        self._raw_text = ""
        self.stopped = False
        self.text = ""

    @property
    def keeps_text(self) -> bool:
        """Whether `text` grows with the tokens."""
        return self._detokenizer is not None

    def add(self, token_id: int) -> int | str | None:
        """Takes the next token; returns the stop string or stop token id that ended it, or None.

        Where no text is kept, a token that is not in `ending_token_ids` may be left out.
        """
        self._num_tokens += 1
        if token_id in self.ending_token_ids:
            if self._keep and self._detokenizer:
                self._raw_text += self._detokenizer.add(token_id)
            self.finish()
            self.stopped = True
            return token_id if token_id in self._stop_ids else None
        if self._detokenizer is None:
            return None
        checked = len(self._raw_text)
        self._raw_text += self._detokenizer.add(token_id)
        return self._check_strings(checked)

    def _check_strings(self, checked: int) -> str | None:
        """Looks for stop strings that end behind the first `checked` characters."""
        if self._num_tokens > self._min_tokens:
            found = [
                (position, stop)
                for stop in self._stop_strings
                if (position := self._raw_text.find(stop, max(0, checked - len(stop) + 1))) >= 0
            ]
            if found:
                position, stop = min(found, key=lambda hit: hit[0])
                self.text = self._raw_text[: position + (len(stop) if self._keep else 0)]
                self.stopped = True
                return stop
        self.text = self._raw_text[: len(self._raw_text) - self._held_back()]
        return None

    def _held_back(self) -> int:
        """Length of the longest end of the text that may become a stop string."""
        longest = 0
        for stop in self._stop_strings:
            for length in range(min(len(stop) - 1, len(self._raw_text)), longest, -1):
                if self._raw_text.endswith(stop[:length]):
                    longest = length
                    break
        return longest

    def finish(self) -> None:
        """Lets go of everything held back, once no more tokens will come."""
        if self.stopped or self._detokenizer is None:
            return
        self._raw_text += self._detokenizer.flush()
        self.text = self._raw_text
