"""From prompts to token ids, and to pixels where there are images."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from sglite.engine.chat_templates import ChatTemplates
from sglite.engine.tokenizer import Tokenizer
from sglite.interface.errors import InvalidRequestError
from sglite.interface.prompts import Prompt
from sglite.multimodal.inputs import MultimodalInputs


class ReadPrompt(NamedTuple):
    """What a request is made from.

    Attributes:
        token_ids: with a placeholder for each row of an image's embeddings.
        multimodal: the images; None where there are none.
        keys: what the prefix cache knows the tokens by; None: their ids.
    """

    token_ids: list[int]
    multimodal: MultimodalInputs | None = None
    keys: np.ndarray | None = None


class PromptReader:
    """Tokenizes prompts, and has their images processed.

    Args:
        tokenizer: for prompts that are text.
        architecture: how messages call the model.
        processor: a `sglite.multimodal.BaseMultimodalProcessor`; None: the model takes text only.
        pad_input_ids: the model's, makes the keys of a prompt with images.
        fetch: gives the bytes behind a http(s) URL of an image; None: such are refused.

    Attributes:
        processor: as given.
        templates: what conversations are rendered with.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        architecture: str,
        processor: Any = None,
        pad_input_ids: Callable[[Sequence[int], MultimodalInputs], Any] | None = None,
        fetch: Callable[[str], bytes] | None = None,
    ):
        self._tokenizer = tokenizer
        self._architecture = architecture
        self.processor = processor
        self.templates = ChatTemplates(tokenizer, processor)
        self._pad_input_ids = pad_input_ids
        self._fetch = fetch

    @property
    def reserved_ids(self) -> tuple[int, ...]:
        """Token ids that a prompt without images must not have."""
        return self.processor.placeholder_ids if self.processor else ()

    def read(self, name: str, prompt: Prompt) -> ReadPrompt:
        """Reads one prompt.

        Args:
            name: how messages call it.
            prompt: what the caller passed.

        Raises:
            InvalidRequestError: it has images that cannot be read, or for which there is no place,
                or the model takes none.
        """
        self.check_takes(name, prompt)
        processor = self.processor
        if prompt.token_ids is not None:
            token_ids = list(prompt.token_ids)
        elif processor is None:
            token_ids = self._tokenizer.encode(prompt.text)
        else:
            token_ids = self._tokenizer.encode(processor.prepare_text(prompt.text))
        if processor is None:
            return ReadPrompt(token_ids)
        token_ids, inputs = processor.process(
            name, token_ids, prompt.images, prompt.videos, self._fetch
        )
        if inputs is None:
            return ReadPrompt(token_ids)
        keys = np.asarray(self._pad_input_ids(token_ids, inputs), np.int64)
        return ReadPrompt(token_ids, inputs, keys)

    def check_takes(self, name: str, prompt: Prompt) -> None:
        """Raises InvalidRequestError if the prompt has images and the model takes none."""
        kind = "images" if prompt.images else "videos" if prompt.videos else None
        if kind and self.processor is None:
            raise InvalidRequestError(
                f"{name} has {kind}, but {self._architecture} takes text only"
            )
