"""Draws ragged batches over paged caches, for the attention tests."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sequences:
    """Whole requests: for each one queries, keys and values at all of its positions."""

    q: list[Tensor]  # each [length, q_heads, head_dim]
    k: list[Tensor]  # each [length, kv_heads, head_dim]
    v: list[Tensor]

    @staticmethod
    def draw(
        lengths: Sequence[int],
        q_heads: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        generator: torch.Generator,
        treacherous: bool = False,
    ) -> "Sequences":
        """Normal numbers; when `treacherous`, ones whose sums depend on the order of adding up.

        Then the second half of a key's channels nearly cancels what the first half adds, and
        values span six powers of ten.
        """

        def normal(length, heads):
            return torch.randn(length, heads, head_dim, generator=generator)

        q = [normal(length, q_heads) for length in lengths]
        k = [normal(length, kv_heads) for length in lengths]
        v = [normal(length, kv_heads) for length in lengths]
        if treacherous:
            half = head_dim // 2
            for query, key, value in zip(q, k, v, strict=True):
                query[..., half : 2 * half] = query[..., :half]
                key[..., :half] *= 8
                key[..., half : 2 * half] -= key[..., :half]
                value *= 10 ** (6 * torch.rand(value.shape[0], 1, 1, generator=generator) - 3)
        return Sequences(*([tensor.to(dtype) for tensor in tensors] for tensors in (q, k, v)))

    def batch(
        self,
        spans: Sequence[tuple[int, int, int]],
        page_size: int,
        generator: torch.Generator,
        kv_end: Sequence[Tensor] | None = None,
    ) -> tuple[Tensor, ...]:
        """The arguments of `paged_attention` up to `kv_end`.

        Span (r, start, stop) is a request that computes positions start to stop - 1 of sequence r,
        the cache holding those before. Pages are shuffled; whatever nothing was written to holds
        NaN. `kv_end` has one tensor [length] for each sequence; causal when absent.
        """
        _, heads, head_dim = self.k[0].shape
        page_counts = [-(-stop // page_size) for _, _, stop in spans]
        num_pages = sum(page_counts) + 2
        caches = torch.full((2, num_pages, page_size, heads, head_dim), torch.nan)
        caches = caches.to(self.k[0].dtype)
        pages = torch.randperm(num_pages, generator=generator).int()
        # Entries past a request's own pages are no pages at all.
        table = torch.full((len(spans), max(page_counts, default=0) + 1), -7, dtype=torch.int32)
        taken = 0
        queries, ends = [], []
        for row, (r, start, stop) in enumerate(spans):
            own = pages[taken : taken + page_counts[row]]
            taken += page_counts[row]
            table[row, : len(own)] = own
            position = torch.arange(stop)
            page, slot = own[position // page_size].long(), position % page_size
            caches[0, page, slot] = self.k[r][:stop]
            caches[1, page, slot] = self.v[r][:stop]
            queries.append(self.q[r][start:stop])
            end = torch.arange(1, stop + 1) if kv_end is None else kv_end[r]
            ends.append(end[start:stop].clamp(max=stop).int())
        counts = torch.tensor([0] + [stop - start for _, start, stop in spans])
        return (
            torch.cat(queries),
            *caches,
            table,
            counts.cumsum(0).int(),
            torch.tensor([stop for _, _, stop in spans], dtype=torch.int32),
            torch.cat(ends),
        )
