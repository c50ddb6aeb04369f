"""Text to token ids and back, over the checkpoint's own Hugging Face tokenizer."""

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from sglite.interface.errors import RequestError

# Enough prompt tokens before the output for a tokenizer whose tokens depend on the one before
# (SentencePiece drops the space of a first word), and for a character that the prompt began.
_CONTEXT = 6
# Tokens that are decoded again with every new one, at most.
_MOST_DECODED = 24
# Seconds after which somebody who keeps the tokenizer for himself is no longer waited for.
_LONGEST_BORROW = 2.0


class Tokenizer:
    """Serialises access to a Hugging Face tokenizer, which refuses use from two threads at once.

    Attributes:
        hf: the tokenizer itself.
    """

    def __init__(self, hf_tokenizer):
        self.hf = hf_tokenizer
        self._lock = threading.Lock()
        self._backend = _backend_of(hf_tokenizer)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, with the tokenizer's special tokens unless told otherwise."""
        return list(self._call(self.hf.encode, text, add_special_tokens=add_special_tokens))

    def decode(self, token_ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids; ids that have no token give nothing."""
        if self._backend is not None:
            return self._call(
                self._backend.decode, list(token_ids), skip_special_tokens=skip_special_tokens
            )
        return self._call(
            self.hf.decode,
            list(token_ids),
            skip_special_tokens=skip_special_tokens,
            clean_up_tokenization_spaces=False,
        )

    def decode_one(self, token_id: int) -> str:
        """Text of a single token, special or not."""
        return self.decode([token_id], skip_special_tokens=False)

    def apply_chat_template(self, messages, *, tools=None, **template_arguments) -> str:
        """A conversation as text, special tokens included, as the checkpoint's template has it.

        Others may use the tokenizer meanwhile: a template is a program, and may take its time.
        """
        return self._call_shared(
            self.hf.apply_chat_template,
            messages,
            tools=tools,
            tokenize=False,
            **template_arguments,
        )

    def _call(self, function: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
        """Calls the tokenizer, alone among the library's threads; raises as `_call_shared`."""
        with self._lock:
            return self._call_shared(function, *arguments, **keywords)

    def _call_shared(self, function: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
        """Calls the tokenizer, and waits for who has it.

        The caller has the tokenizer as well, and may be changing its truncation right now, which
        excludes every other use ("Already borrowed"): that takes microseconds, and is waited for.

        Raises:
            RequestError: the tokenizer panicked: Rust's panics are no `Exception`.
        """
        give_up = time.monotonic() + _LONGEST_BORROW
        while True:
            try:
                return function(*arguments, **keywords)
            except RuntimeError as error:
                if "borrowed" not in str(error) or time.monotonic() > give_up:
                    raise
                time.sleep(0.0005)
            except BaseException as error:
                if isinstance(error, Exception | KeyboardInterrupt | SystemExit):
                    raise
                raise RequestError(f"the tokenizer panicked: {error}") from error


def _backend_of(hf_tokenizer):
    """What the tokenizer's `decode` comes to, or None where a class has its own way.

    It is called for every token of a stream, and takes a third of the time.
    """
    # Not at the top: `import sglite` must not take the time that this one does.
    from transformers import PreTrainedTokenizerFast

    kind = type(hf_tokenizer)
    is_plain = (
        isinstance(hf_tokenizer, PreTrainedTokenizerFast)
        and kind.decode is PreTrainedTokenizerFast.decode
        and kind._decode is PreTrainedTokenizerFast._decode
    )
    return hf_tokenizer.backend_tokenizer if is_plain else None


class IncrementalDetokenizer:
    """Text of a growing sequence in pieces that add up to the whole.

    A token's text may depend on its neighbours, so a window is decoded with and without the new
    token and the difference handed out; an unfinished UTF-8 character is held back.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], skip_special: bool):
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._window = self._context(prompt_token_ids)
        self._num_settled = len(self._window)  # tokens of the window whose text is out
        # A character that the prompt has begun counts as not out yet.
        self._settled_text = self._decode(self._window).rstrip("\ufffd")

    def _context(self, prompt_token_ids: Sequence[int]) -> list[int]:
        """The prompt's last tokens, from the start of a character on.

        What is left of a character at the front would look like one that the prompt has begun at
        its end. A character has up to four bytes, and a token at least one.
        """
        context: list[int] = []
        for length in range(_CONTEXT, _CONTEXT + 4):
            context = [int(token) for token in prompt_token_ids[-length:]]
            if not self._decode(context).startswith("\ufffd"):
                break
        return context

    def add(self, token_id: int) -> str:
        """Takes a token and returns the text that is now certain."""
        return self.add_all([token_id])

    def add_all(self, token_ids: Sequence[int]) -> str:
        """Takes several tokens at once."""
        self._window += token_ids
        text = self._decode(self._window)
        if text.endswith("\ufffd"):
            return ""
        return self._settle(text)

    def flush(self) -> str:
        """Returns what is left, with replacement characters for bytes that are no UTF-8."""
        return self._settle(self._decode(self._window))

    def _settle(self, text: str) -> str:
        """Hands out what `text`, the window's, has beyond the settled part."""
        piece = text[len(self._settled_text) :]
        self._settled_text = text
        if len(self._window) > _MOST_DECODED:
            self._window = self._window[max(0, self._num_settled - _CONTEXT) :]
            self._settled_text = self._decode(self._window)
        self._num_settled = len(self._window)
        return piece

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=self._skip_special)
