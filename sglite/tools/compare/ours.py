"""Running texts through sglite's engine, with every row of logits taken out."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sglite.engine.invariance import LogitsRecorder
from sglite.engine.request import Request
from sglite.interface.errors import GenerationError
from sglite.interface.sampling_params import SamplingParams
from sglite.llm import LLM

#: Of a prompt, logits are compared at no more than its last so many positions.
MOST_PROMPT_ROWS = 256


@dataclass(frozen=True, slots=True)
class Text:
    """A prompt and what follows it.

    Attributes:
        prompt: token ids.
        following: token ids, which are fed one by one whatever the logits say.
    """

    prompt: list[int]
    following: list[int]

    @property
    def computed(self) -> list[int]:
        """The ids that the model sees: nothing depends on the last one."""
        return [*self.prompt, *self.following][:-1]

    @property
    def first_row(self) -> int:
        """The first position whose logits are compared."""
        return max(0, len(self.prompt) - MOST_PROMPT_ROWS)


def generate(llm: LLM, prompts: Sequence[list[int]], count: int) -> tuple[list[list[int]], str]:
    """What follows the prompts greedily, and the error that ended it; "" where none did.

    All prompts are one batch, over the prefix cache, as a user runs them.
    """
    error = ""
    try:
        outputs = llm.generate(
            [{"token_ids": ids} for ids in prompts],
            temperature=0,
            max_new_tokens=count,
            ignore_eos=True,
            logprobs=None,
            repetition_penalty=1.0,
            progress=False,
        )
    except GenerationError as failure:
        outputs, error = failure.outputs, str(failure)
    return [list(output.token_ids) for output in outputs], error


def forced_logits(
    llm: LLM, texts: Sequence[Text], *, together: bool = True, **changes: Any
) -> list[Tensor]:
    """Next-token logits along texts: of each the positions from `first_row` to the last but one.

    Prompts are prefilled in the engine's chunks, and what follows is decoded token by token.

    Args:
        llm: the model.
        texts: what to run.
        together: whether all are one batch, and not one after the other.
        **changes: of fields of `llm.config`.

    Returns:
        [positions, vocabulary] float32 on the CPU for each text.

    Raises:
        RequestError: the model fails.
    """
    rows = _Rows(texts)
    requests = [_request(index, text, rows) for index, text in enumerate(texts)]
    page = llm.config.page_size
    pages = sum(-(-(len(text.prompt) + len(text.following)) // page) for text in texts)
    llm.record_logits(
        [requests] if together else [[request] for request in requests],
        kv_cache_tokens=pages * page,
        max_running_requests=len(texts) if together else 1,
        prefix_cache=False,
        **changes,
    )
    return [torch.stack(found) for found in rows.found]


class _Rows:
    """Takes rows of logits, in the order of positions."""

    def __init__(self, texts: Sequence[Text]):
        self.found: list[list[Tensor]] = [[] for _ in texts]

    def take(self, prompt: int, first_position: int, logits: Tensor) -> None:
        """Keeps logits [n, vocabulary]."""
        self.found[prompt] += logits.detach().to("cpu", torch.float32, copy=True)


def _request(index: int, text: Text, rows: _Rows) -> Request:
    recorder = LogitsRecorder(rows, index, len(text.prompt), text.following)
    params = SamplingParams(
        temperature=0,
        max_new_tokens=len(text.following),
        ignore_eos=True,
        prompt_logprobs=0,
        prompt_logprobs_start=text.first_row + 1,
        logits_processors=[recorder],
    )
    return Request(text.prompt, params.resolve())
