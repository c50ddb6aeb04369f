"""From a scheduled step to the tensors of a forward pass."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sglite import _C, ops
from sglite.engine.scheduler import ScheduledRequest, Step
from sglite.engine.transfer import upload
from sglite.layers.forward_batch import ForwardBatch


class ImageRows(NamedTuple):
    """What of a step's tokens stands for images."""

    rows: NDArray[np.int64]  # [N], ascending
    embeds: Tensor  # [N, hidden_size], on the model's device


class LogitsRows(NamedTuple):
    """Which rows of the logits belong to one request of a step.

    Rows `first_prompt_row` to `first_prompt_row + num_prompt_rows` score the prompt tokens from
    position `first_prompt_position` on; `sample_row` gives the next token.
    """

    first_prompt_row: int
    num_prompt_rows: int
    first_prompt_position: int
    sample_row: int | None


@dataclass(slots=True, frozen=True)
class Layout:
    """The tokens of all requests of a step, one after the other, on the host.

    T tokens, B requests, R rows whose logits are wanted. For a token that a step in flight is
    sampling `input_ids` holds nothing that means anything.
    """

    input_ids: NDArray[np.int64]  # [T]
    positions: NDArray[np.int64]  # [T]
    slots: NDArray[np.int64]  # [T]
    query_start: NDArray[np.int32]  # [B + 1]
    kv_lens: NDArray[np.int32]  # [B]
    kv_end: NDArray[np.int32]  # [T]
    page_table: NDArray[np.int32]  # [B, the most pages of a request]
    wanted: NDArray[np.int64]  # [R]
    rows: list[LogitsRows]  # one for each request of the step
    mrope_positions: NDArray[np.int64] | None = None  # [3, T]


def lay_out(step: Step, page_size: int) -> Layout:
    """Lays the scheduled tokens of all requests one after the other."""
    requests = [item.request for item in step.items]
    arrays = _C.lay_out(
        [request.token_ids for request in requests],
        [request.pages for request in requests],
        [request.num_pages for request in requests],
        [item.start for item in step.items],
        [item.stop for item in step.items],
        page_size,
    )
    positions, query_start, kv_end = arrays[1], arrays[3], arrays[5]
    starts = query_start.tolist()
    mrope_positions = None
    for item, offset in zip(step.items, starts, strict=False):
        inputs = item.request.multimodal
        if inputs is None:
            continue
        rows = slice(offset, offset + item.stop - item.start)
        if inputs.positions is not None:
            if mrope_positions is None:
                mrope_positions = np.tile(positions, (3, 1))
            mrope_positions[:, rows] = inputs.rope_positions(item.start, item.stop)
        if inputs.whole_spans:
            _see_both_ways(kv_end[rows], item)
    return Layout(*arrays, *_wanted_logits(step, starts), mrope_positions)


def _see_both_ways(kv_end: NDArray[np.int32], item: ScheduledRequest) -> None:
    """Lets the tokens of an image see each other; `kv_end` is that of the request's tokens."""
    for span in item.request.multimodal.overlapping(item.start, item.stop):
        kv_end[span.start - item.start : span.stop - item.start] = span.stop


def to_forward(
    layout: Layout,
    kv_cache: Sequence[tuple[Tensor, Tensor]],
    device: torch.device,
    images: ImageRows | None = None,
    layer_calls: dict[int, Any] | None = None,
    spare_memory: ops.SpareMemory | None = None,
) -> tuple[Tensor, Tensor, ForwardBatch]:
    """The arguments of a model's forward: token ids, positions, and the batch.

    Args:
        layout: of the step.
        kv_cache: as in `ForwardBatch`.
        device: of the model.
        images: which tokens stand for images, and what they have instead of embeddings; None:
            there are none in the step.
        layer_calls: as in `ForwardBatch`, of passes over the same cache; None: there were none.
        spare_memory: as in `ForwardBatch`; None: there is none yet.
    """
    arrays = [
        layout.input_ids,
        layout.positions,
        layout.slots,
        layout.query_start,
        layout.kv_lens,
        layout.kv_end,
        layout.page_table,
        layout.wanted,
    ]
    if layout.mrope_positions is not None:
        arrays.append(layout.mrope_positions)
    if images is not None:
        arrays.append(images.rows)
    uploaded = list(upload(arrays, device))
    input_ids, positions, slots, query_start, kv_lens, kv_end, page_table, wanted, *rest = uploaded
    image_rows = rest.pop() if images is not None else None
    return (
        input_ids,
        positions,
        ForwardBatch(
            query_start=query_start,
            kv_lens=kv_lens,
            kv_end=kv_end,
            slots=slots,
            page_table=page_table,
            logits_rows=wanted,
            kv_cache=kv_cache,
            max_query_tokens=int(np.diff(layout.query_start).max()),
            mrope_positions=rest[0] if rest else None,
            image_rows=image_rows,
            image_embeds=None if images is None else images.embeds,
            layer_calls={} if layer_calls is None else layer_calls,
            spare_memory=ops.SpareMemory() if spare_memory is None else spare_memory,
        ),
    )


def _wanted_logits(step: Step, query_start: list[int]) -> tuple[np.ndarray, list[LogitsRows]]:
    """The token rows whose logits are wanted, ascending, and what each request wants them for."""
    wanted: list[int] = []
    rows = []
    for index, item in enumerate(step.items):
        request = item.request
        first_row, num_prompt_rows, first_position = len(wanted), 0, 0
        if request.misses_prompt_logprobs:
            # The row of position p scores the token at p + 1.
            first_position = request.num_prompt_tokens - request.num_missing_prompt_logprobs
            end = min(item.stop, request.num_prompt_tokens - 1)
            offset = query_start[index] - item.start
            wanted.extend(range(offset + first_position - 1, offset + end))
            num_prompt_rows = len(wanted) - first_row
        sample_row = None
        if item.samples:
            sample_row = len(wanted)
            wanted.append(query_start[index + 1] - 1)
        rows.append(LogitsRows(first_row, num_prompt_rows, first_position, sample_row))
    return np.array(wanted, np.int64), rows
