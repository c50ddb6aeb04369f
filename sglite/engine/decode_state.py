"""The inputs of decode steps, at fixed addresses on the device."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from sglite import ops
from sglite.cache.kv_pool import KVPool
from sglite.engine.request import Request
from sglite.engine.sampler import kernel_rows
from sglite.engine.sampling_state import SamplingState, parameters
from sglite.engine.scheduler import ScheduledRequest
from sglite.engine.transfer import torch_dtype, upload
from sglite.layers.forward_batch import ForwardBatch
from sglite.ops.sampling import INTEGERS, REALS

# What is uploaded of each row: dtype and number of elements. In this order every field is aligned,
# and what a step gives lies together.
_UPLOADED = {
    "token_ids": (np.int64, 1),
    "status": (np.int32, 1),
    "kv_lens": (np.int32, 1),
    "positions": (np.int64, 1),
    "rope_offsets": (np.int64, 1),
    "slots": (np.int64, 1),
    "integers": (np.int64, len(INTEGERS)),
    "kv_end": (np.int32, 1),
    "reals": (np.float32, len(REALS)),
}
# How rows without a request sample: the most probable token.
_GREEDY = [1.0 if name in ("top_p", "repetition_penalty") else 0.0 for name in REALS]
# Requests, incarnations and positions of rows that stand for none.
_NOTHING = (), (), ()


class DecodeRows(NamedTuple):
    """Views of the first rows of a `DecodeState`."""

    token_ids: Tensor  # [R]
    status: Tensor  # [R]
    reals: Tensor  # [R, 6]
    integers: Tensor  # [R, 4]
    advanced: tuple[Tensor, ...]  # what `sglite.ops.advance` takes
    rope_offsets: Tensor  # [R]
    inputs: tuple[Tensor, Tensor, ForwardBatch]  # what the model's forward takes


class DecodeState:
    """One row for each request of a decode step: what it feeds, where it stands, how it samples.

    A step begins with `advance`, which moves every row on by one token, the one that the step
    before has drawn. So steps that follow each other with the same requests need nothing of the
    host, and what is uploaded otherwise is the state one token back. Rows beyond the requests have
    no positions; they stay where they are, and what is computed for them goes to slot 0, of the
    reserved page.

    Args:
        max_rows: requests of a step at most.
        max_pages: pages of a request at most.
        pool: the KV cache.
        has_mrope: whether the model has M-RoPE, whose positions lie behind the images of a request
            at an offset from those in the cache.

    Attributes:
        token_ids: [max_rows] int64, what the last step has drawn for each row.
        status: [max_rows] int32, as `sglite.ops.sample` gives it.
        reals, integers: its parameters.
    """

    def __init__(self, max_rows: int, max_pages: int, pool: KVPool, *, has_mrope: bool = False):
        device = pool.device
        self._pool = pool
        self._max_rows = max_rows
        self._uploaded = torch.zeros(
            sum(np.dtype(dtype).itemsize * width * max_rows for dtype, width in _UPLOADED.values()),
            dtype=torch.uint8,
            device=device,
        )
        views = self._views(self._uploaded)
        self.token_ids, self.status = views["token_ids"], views["status"]
        self.reals, self.integers = views["reals"], views["integers"]
        self._positions, self._slots = views["positions"], views["slots"]
        self._rope_offsets = views["rope_offsets"]
        self._mrope_positions = torch.zeros_like(self._positions) if has_mrope else None
        self._kv_lens, self._kv_end = views["kv_lens"], views["kv_end"]
        self._input_ids = torch.zeros(max_rows, dtype=torch.int64, device=device)
        self._page_table = torch.zeros(max_rows, max_pages, dtype=torch.int32, device=device)
        # The same memory, where the host can write to it.
        self._host_page_table = self._page_table.numpy() if device.type == "cpu" else None
        self._query_start = torch.arange(max_rows + 1, dtype=torch.int32, device=device)
        self._rows = torch.arange(max_rows, dtype=torch.int64, device=device)
        # Requests, incarnations and next positions of the rows, after the step last launched.
        self._stands_for: tuple[tuple, tuple, tuple] = _NOTHING
        self._page_counts: list[int] = []

    def set(
        self,
        items: Sequence[ScheduledRequest],
        states: Sequence[SamplingState],
        drawn: Tensor | None,
        sources: Sequence[int],
    ) -> None:
        """Makes the rows ready for a step of these requests, with as little as is new to them.

        Args:
            items: one token of each of these requests; their tokens so far have a position.
            states: how they sample.
            drawn: what the step launched last has drawn.
            sources: for each request the row of `drawn` that holds the token to feed; -1 where the
                request knows it.
        """
        requests, starts, stops, _, incarnations = zip(*items, strict=True)
        page_counts = [request.num_pages for request in requests]
        if self._stands_for != (requests, incarnations, starts):
            self._upload(items, states, drawn, sources)
        elif page_counts != self._page_counts:
            self._add_pages(requests)
        self._stands_for = requests, incarnations, stops
        self._page_counts = page_counts

    def forget(self) -> None:
        """Holds on to no request: the next step's are new to all rows."""
        self._stands_for, self._page_counts = _NOTHING, []

    def _add_pages(self, requests: Sequence[Request]) -> None:
        """Writes into the page table what these requests, those of the rows, have got since."""
        grown = [
            (row, count, request)
            for row, (request, count) in enumerate(zip(requests, self._page_counts, strict=True))
            if request.num_pages > count
        ]
        if self._host_page_table is not None:
            for row, count, request in grown:
                added = slice(count, request.num_pages)
                self._host_page_table[row, added] = request.pages[added]
            return
        if not grown:
            return
        rows, columns, pages = [], [], []
        for row, count, request in grown:
            columns += range(count, request.num_pages)
            rows += [row] * (request.num_pages - count)
            pages += request.pages[count : request.num_pages].tolist()
        where, what = upload(
            [np.array([rows, columns], np.int64), np.array(pages, np.int32)], self._pool.device
        )
        self._page_table[where[0], where[1]] = what

    def _upload(
        self,
        items: Sequence[ScheduledRequest],
        states: Sequence[SamplingState],
        drawn: Tensor | None,
        sources: Sequence[int],
    ) -> None:
        count = len(items)
        image = np.zeros(self._uploaded.shape, np.uint8)
        views = {name: view.numpy() for name, view in self._views(torch.from_numpy(image)).items()}
        starts = [item.start for item in items]
        views["token_ids"][:count] = [item.request.token_ids[item.start] for item in items]
        views["positions"][:count] = np.array(starts) - 1
        views["kv_lens"][:count] = views["kv_end"][:count] = starts
        if self._mrope_positions is not None:
            views["rope_offsets"][:count] = [item.request.rope_offset for item in items]
        views["reals"][:count], views["integers"][:count] = parameters(
            states, [item.output_index - 1 for item in items]
        )
        views["reals"][count:] = _GREEDY
        width = max(item.request.num_pages for item in items)
        page_table = np.zeros((count, width), np.int32)
        for row, item in enumerate(items):
            page_table[row, : item.request.num_pages] = item.request.held_pages
        image, page_table, source = upload(
            [image, page_table, np.array(sources, np.int32)], self._pool.device
        )
        if drawn is not None:
            drawn = drawn.clone()  # it may be a part of what is overwritten now
        self._uploaded.copy_(image)
        self._page_table[:count, :width].copy_(page_table)
        if max(sources) >= 0:
            ops.gather_tokens(self.token_ids[:count], drawn, source)

    def rows(
        self,
        count: int,
        kv_cache: Sequence[tuple[Tensor, Tensor]],
        spare_memory: ops.SpareMemory,
    ) -> DecodeRows:
        """The first `count` rows, and the batch that they are for the model."""
        batch = ForwardBatch(
            query_start=self._query_start[: count + 1],
            kv_lens=self._kv_lens[:count],
            kv_end=self._kv_end[:count],
            slots=self._slots[:count],
            page_table=self._page_table[:count],
            logits_rows=self._rows[:count],
            kv_cache=kv_cache,
            max_query_tokens=1,
            mrope_positions=None
            if self._mrope_positions is None
            else self._mrope_positions[:count],
            spare_memory=spare_memory,
        )
        token_ids, integers = self.token_ids[:count], self.integers[:count]
        input_ids, positions = self._input_ids[:count], self._positions[:count]
        return DecodeRows(
            token_ids,
            self.status[:count],
            self.reals[:count],
            integers,
            (
                token_ids,
                input_ids,
                positions,
                batch.kv_lens,
                batch.kv_end,
                batch.slots,
                integers,
                batch.page_table,
            ),
            self._rope_offsets[:count],
            (input_ids, positions, batch),
        )

    def advance(self, rows: DecodeRows) -> None:
        """Moves these rows on by one token."""
        ops.advance(*rows.advanced, self._pool.page_size)
        _, positions, batch = rows.inputs
        if batch.mrope_positions is not None:
            torch.add(positions, rows.rope_offsets, out=batch.mrope_positions)

    def step(
        self, model: nn.Module, rows: DecodeRows, workspace: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Moves these rows on by one token, and draws the next one of each.

        Args:
            model: as the model runner's.
            rows: of this state.
            workspace: gives what `sglite.ops.sample` needs for these logits.

        Returns:
            The logits, [R, vocab_size] float32.
        """
        self.advance(rows)
        logits = kernel_rows(model(*rows.inputs).next_token_logits)
        ops.sample(
            logits,
            rows.reals,
            rows.integers,
            workspace=workspace(logits),
            out=(rows.token_ids, rows.status),
        )
        return logits

    def save(self) -> Tensor:
        """A copy of what a step changes; `restore` takes it."""
        return self._uploaded.clone()

    def restore(self, saved: Tensor) -> None:
        """Goes back to before the steps since `save`."""
        self._uploaded.copy_(saved)

    def _views(self, buffer: Tensor) -> dict[str, Tensor]:
        """The fields that lie one after the other in `buffer`."""
        views, offset = {}, 0
        for name, (dtype, width) in _UPLOADED.items():
            num_bytes = np.dtype(dtype).itemsize * width * self._max_rows
            view = buffer[offset : offset + num_bytes].view(torch_dtype(np.dtype(dtype)))
            views[name] = view.view(self._max_rows, width) if width > 1 else view
            offset += num_bytes
        return views
