"""Runs the model on a scheduled step and samples the next tokens."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
from torch import Tensor, nn

from sglite import ops
from sglite.cache.kv_pool import KVPool
from sglite.engine.batch import LogitsRows, lay_out, to_forward
from sglite.engine.decode_runner import DecodeRunner
from sglite.engine.drawn_tokens import DrawnTokens
from sglite.engine.failures import failed
from sglite.engine.image_features import ImageFeatures
from sglite.engine.memory import give_back_free_memory
from sglite.engine.request import Request
from sglite.engine.sampler import Sampler
from sglite.engine.scheduler import Outcome, PageCopy, ScheduledRequest, Step
from sglite.engine.tokenizer import Tokenizer
from sglite.engine.transfer import upload
from sglite.interface.errors import RequestError

_NOTHING: Mapping[int, Any] = MappingProxyType({})
# Requests of a step whose logits are worth asking `malloc` for, which takes up to 3 ms.
_LARGE_BATCH = 8


class ModelRunner:
    """Owns the model and the tensors of the KV cache.

    Args:
        model: `forward(input_ids, positions, forward_batch)` gives an object with
            `next_token_logits`, float32[R, vocabulary].
        pool: the KV cache.
        tokenizer: for the text of log-probabilities.
        make_decode: makes what runs decode steps of the model, the pool, the sampler and the
            spare memory; None: they are run like all others.
        images: gives the embeddings of images; None: the model takes text only.

    Attributes:
        runs_ahead: whether `launch` returns before the step is computed, as on a GPU.
    """

    def __init__(
        self,
        model: nn.Module,
        pool: KVPool,
        tokenizer: Tokenizer,
        make_decode: Callable[..., DecodeRunner] | None = None,
        images: ImageFeatures | None = None,
    ):
        self.model = model
        self._images = images
        self.pool = pool
        self.sampler = self.make_sampler(tokenizer)
        self.runs_ahead = pool.device.type == "cuda"
        self._spare_memory = ops.SpareMemory()
        self._decode = None
        if make_decode is not None:
            self._decode = make_decode(model, pool, self.sampler, self._spare_memory)
        self._drawing: dict[Request, int] = {}  # rows of `_drawn` in the step launched last
        self._drawn: Tensor | None = None
        self._layer_calls: dict[int, Any] = {}  # of the batches that are laid out anew
        self._largest_batch = 0  # since the last rest

    def launch(self, step: Step) -> "LaunchedStep":
        """Begins to compute a step; steps are computed in the order of the calls."""
        # Also in a step that has nothing else, for want of pages: the copied tokens are counted.
        self._copy_pages(step.page_copies)
        if not step.items:
            return LaunchedStep([], None)
        self._largest_batch = max(self._largest_batch, len(step.items))
        drawn = self.launch_decode(step)
        launched = self._launch_eagerly(step) if drawn is None else LaunchedStep(step.items, drawn)
        if self.runs_ahead:
            drawing = [item.request for item in step.items if item.samples]
            self._drawing = {request: row for row, request in enumerate(drawing)}
            self._drawn = launched.drawn.token_ids if launched.drawn else None
        return launched

    def make_sampler(self, tokenizer: Tokenizer) -> Sampler:
        """What draws tokens; asked for once."""
        return Sampler(tokenizer)

    def launch_decode(self, step: Step) -> DrawnTokens | None:
        """Begins a step by what `make_decode` has made; None where that does not take it."""
        if self._decode is None or not self._decode.takes(step):
            return None
        return self._decode.launch(step, self._drawn, self._sources(step))

    def _launch_eagerly(self, step: Step) -> "LaunchedStep":
        layout = lay_out(step, self.pool.page_size)
        images, failures = None, {}
        if self._images is not None:
            images, failures = self._images.of_step(step, layout.query_start)
        input_ids, positions, batch = to_forward(
            layout,
            self.pool.layers,
            self.pool.device,
            images,
            self._layer_calls,
            self._spare_memory,
        )
        drawn_rows = self._sources(step)
        if max(drawn_rows) >= 0:
            sources = np.full(len(layout.input_ids), -1, np.int32)
            # The token of a step in flight is always the last one of its request.
            sources[layout.query_start[1:] - 1] = drawn_rows
            (source_tensor,) = upload([sources], self.pool.device)
            ops.gather_tokens(input_ids, self._drawn, source_tensor)
        logits = self.model(input_ids, positions, batch).next_token_logits
        prompt_logprobs = {}
        for index, (item, row) in enumerate(zip(step.items, layout.rows, strict=True)):
            if row.num_prompt_rows and index not in failures:
                try:
                    prompt_logprobs[index] = self.score_prompt(item.request, row, logits)
                except BaseException as error:  # the tokenizer, on the texts of one request
                    failures[index] = failed("prompt_logprobs", error)
        drawn = self._draw(step.items, layout.rows, logits)
        return LaunchedStep(step.items, drawn, prompt_logprobs, failures)

    def _sources(self, step: Step) -> list[int]:
        """For each request the row of what was drawn last with its last token; -1 if known."""
        if not self._drawing:
            return [-1] * len(step.items)
        return [
            self._drawing[item.request] if item.stop > item.request.num_tokens else -1
            for item in step.items
        ]

    def _copy_pages(self, copies: Sequence[PageCopy]) -> None:
        """Copy on write: the matching start of a shared page goes to the request's own page."""
        if copies:
            size = self.pool.page_size
            source = [copy.source * size + i for copy in copies for i in range(copy.num_tokens)]
            destination = [
                copy.destination * size + i for copy in copies for i in range(copy.num_tokens)
            ]
            self.pool.copy_slots(source, destination)

    def _draw(
        self, items: Sequence[ScheduledRequest], rows: Sequence[LogitsRows], logits: Tensor
    ) -> DrawnTokens | None:
        wanted = [row.sample_row for row in rows if row.sample_row is not None]
        if not wanted:
            return None
        if len(wanted) < len(logits):
            (indices,) = upload([np.array(wanted)], logits.device)
            logits = logits[indices]
        sampling = [item for item in items if item.samples]
        return self.sampler.draw(
            logits,
            [item.request for item in sampling],
            [item.output_index for item in sampling],
        )

    def score_prompt(self, request: Request, row: LogitsRows, logits: Tensor) -> list:
        """The log-probabilities of a chunk of a prompt, one entry for each of its rows of logits.

        Args:
            request: which asks for them.
            row: says which rows are its own.
            logits: [R, vocabulary] of the whole step.
        """
        first = row.first_prompt_position
        return self.sampler.score(
            logits[row.first_prompt_row : row.first_prompt_row + row.num_prompt_rows],
            request.token_ids[first : first + row.num_prompt_rows],
            request.params.prompt_logprobs,
        )

    def stats(self) -> dict[str, int]:
        """Counts of images; see `LLM.stats`."""
        images = self._images
        return {
            "images_encoded": images.num_encoded if images else 0,
            "image_cache_bytes": images.num_cached_bytes if images else 0,
        }

    def rest(self) -> None:
        """Lets go of the requests that it knows, and of what it holds for them."""
        if self._decode is not None:
            self._decode.rest()
        if self._images is not None:
            self._images.rest()
        self._drawing, self._drawn = {}, None
        self._layer_calls.clear()
        self._spare_memory.drop()
        # The thread of the next steps is another one, for which `malloc` may have another heap.
        if self._largest_batch >= _LARGE_BATCH and self.pool.device.type == "cpu":
            give_back_free_memory()
        self._largest_batch = 0

    def close(self) -> None:
        """Drops the model and the cache's tensors."""
        if self._decode is not None:
            self._decode.close()
        if self._images is not None:
            self._images.close()
        self.model = self._decode = self._drawn = self._images = None
        self._drawing.clear()
        self._layer_calls.clear()
        self._spare_memory.drop()
        self.pool.close()


class LaunchedStep:
    """A step that is being computed, or has been.

    Args:
        items: its requests.
        drawn: the tokens of those that sample; None if none does.
        prompt_logprobs: by index of the request.
        failures: by index of the request, of those that failed by themselves.
    """

    def __init__(
        self,
        items: Sequence[ScheduledRequest],
        drawn: DrawnTokens | None,
        prompt_logprobs: Mapping[int, list] = _NOTHING,
        failures: Mapping[int, RequestError] = _NOTHING,
    ):
        self.drawn = drawn
        self._items = items
        self._prompt_logprobs = prompt_logprobs
        self._failures = failures

    def outcomes(self) -> list[Outcome]:
        """Waits for the step; gives one outcome for each of its requests, in order."""
        drawn = self.drawn.collect() if self.drawn else []
        if len(drawn) == len(self._items) and not (self._prompt_logprobs or self._failures):
            return drawn
        sampled = iter(drawn)
        outcomes = []
        for index, item in enumerate(self._items):
            outcome = next(sampled) if item.samples else Outcome()
            outcomes.append(
                outcome._replace(
                    error=self._failures.get(index, outcome.error),
                    prompt_logprobs=self._prompt_logprobs.get(index, ()),
                )
            )
        return outcomes
