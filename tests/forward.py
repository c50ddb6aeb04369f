"""Running a model on a ragged batch without an engine."""

import random
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sglite.cache.kv_pool import KVPool, LayerSpec
from sglite.layers.forward_batch import ForwardBatch


class Runner:
    """Runs sequences piece by piece over a paged cache whose pages lie in random order."""

    def __init__(
        self,
        model: nn.Module,
        kv_layers: Sequence[LayerSpec],
        dtype: torch.dtype,
        *,
        num_sequences: int,
        max_length: int = 512,
        page_size: int = 16,
        seed: int = 0,
    ):
        self.model = model
        self.page_size = page_size
        pages_each = -(-max_length // page_size)
        num_pages = 1 + num_sequences * pages_each
        self.pool = KVPool(num_pages, page_size, kv_layers, dtype)
        pages = list(range(1, num_pages))
        random.Random(seed).shuffle(pages)
        self.page_table = torch.tensor(pages, dtype=torch.int32).view(num_sequences, pages_each)
        self.lengths = [0] * num_sequences

    def run(self, pieces: Sequence[Sequence[int]], *, all_logits: bool = True) -> list[Tensor]:
        """Appends `pieces[i]` (maybe empty) to sequence i; gives its new tokens' logits.

        With `all_logits=False`, only those of the last token.
        """
        rows = [i for i, piece in enumerate(pieces) if piece]
        counts = [len(pieces[i]) for i in rows]
        positions = [torch.arange(self.lengths[i], self.lengths[i] + len(pieces[i])) for i in rows]
        slots = [
            self.page_table[i, position // self.page_size].long() * self.page_size
            + position % self.page_size
            for i, position in zip(rows, positions, strict=True)
        ]
        for i in rows:
            self.lengths[i] += len(pieces[i])
        ends = torch.tensor(counts).cumsum(0)
        flat = torch.cat(positions)
        batch = ForwardBatch(
            query_start=torch.cat([torch.zeros(1), ends]).int(),
            kv_lens=torch.tensor([self.lengths[i] for i in rows], dtype=torch.int32),
            kv_end=(flat + 1).int(),
            slots=torch.cat(slots),
            page_table=self.page_table[rows].contiguous(),
            logits_rows=torch.arange(len(flat)) if all_logits else ends - 1,
            kv_cache=self.pool.layers,
        )
        input_ids = torch.tensor([token for i in rows for token in pieces[i]])
        with torch.inference_mode():
            logits = self.model(input_ids, flat, batch).next_token_logits
        sizes = counts if all_logits else [1] * len(rows)
        parts = dict(zip(rows, logits.split(sizes), strict=True))
        return [parts.get(i, logits[:0]) for i in range(len(pieces))]


def assert_near(actual: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    """Checks logits, relative to the largest."""
    assert actual.shape == expected.shape
    error = (actual - expected).abs().max() / expected.abs().max()
    assert error <= tolerance, f"relative error {error:.2e}, allowed {tolerance:.0e}"
