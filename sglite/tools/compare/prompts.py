"""The prompts that models are compared on."""

import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn

from sglite.interface.errors import InvalidRequestError
from sglite.interface.prompts import normalize_prompts
from sglite.layers.attention import RadixAttention

# Tokens that a prompt has beyond the chunk size, or beyond a window.
_BEYOND = 9
_TEXT = """\
The lighthouse keeper wrote down the weather three times a day, in a hand so small that nobody else
could read it. On the first of March the wind turned north; by noon there were 17 ships in the bay,
and two of them had lost a mast. "Is it always like this?" asked the boy. She shook her head, lit
the lamp, and counted: 1, 2, 3, 5, 8, 13. Der Nebel kam am Abend. Rain followed, then hail, and then
a silence in which you could hear the ropes freeze. def keep(light): return light if light > 0 else
None. In the morning they walked along the shore to see what the sea had brought: planks, a brass
compass, half a crate of oranges, and a letter, addressed to a street that did not exist any more.
"""


def builtin_lengths(page_size: int, chunk: int, windows: Iterable[int], room: int) -> list[int]:
    """Lengths at which something may go wrong, in tokens.

    One token, both sides of the first page's border, beyond the chunk size, and beyond every
    sliding window; a length for which there is no room becomes the longest that there is room for.
    """
    lengths = {1, page_size - 1, page_size, page_size + 1, chunk + _BEYOND}
    lengths |= {window + _BEYOND for window in windows}
    return sorted({min(max(1, length), room) for length in lengths})


class NoTokenizer:
    """Stands in where a checkpoint has none: prompts are then token ids, and texts too."""

    def encode(self, text: str, **others: Any) -> list[int]:
        """Refuses; the built-in prompts are random ids instead."""
        raise InvalidRequestError(
            "the checkpoint has no tokenizer: give prompts as token ids, or pass tokenizer="
        )

    def decode(self, token_ids: Iterable[int], **others: Any) -> str:
        """The ids themselves."""
        return " ".join(map(str, token_ids))


def builtin_prompts(lengths: Sequence[int], vocab_size: int, tokenizer: Any) -> list[list[int]]:
    """Starts of a text, or of random ids where there is no tokenizer."""
    draw = random.Random(0)
    longest = max(lengths)
    if isinstance(tokenizer, NoTokenizer):
        ids = [draw.randrange(vocab_size) for _ in range(longest)]
    else:
        ids = [token for token in tokenizer.encode(_TEXT) if token < vocab_size]
    # Other words follow each time that the text begins anew.
    while len(ids) < longest:
        start = draw.randrange(len(ids))
        ids += ids[start : start + 50]
    return [ids[:length] for length in lengths]


def given_prompts(prompts: Any, encode: Callable[[str], list[int]], room: int) -> list[list[int]]:
    """The caller's prompts as token ids.

    Raises:
        InvalidRequestError: there is none, one is empty, or longer than there is room for.
    """
    normalized, _ = normalize_prompts(prompts)
    if not normalized:
        raise InvalidRequestError("prompts=[] is not allowed: there is nothing to compare")
    found = []
    for index, prompt in enumerate(normalized):
        ids = encode(prompt.text) if prompt.token_ids is None else list(prompt.token_ids)
        if not 1 <= len(ids) <= room:
            raise InvalidRequestError(
                f"prompts[{index}] has {len(ids)} tokens; there is room for 1 to {room} in front "
                f"of the new ones"
            )
        found.append(ids)
    return found


def windows_of(model: nn.Module) -> set[int]:
    """The sliding windows of a model's attention layers."""
    parts = (module for module in model.modules() if isinstance(module, RadixAttention))
    return {part.sliding_window for part in parts if part.sliding_window}
