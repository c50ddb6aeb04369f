"""What one forward pass works on, beside the token ids and positions."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sglite import ops


@dataclass(slots=True, frozen=True)
class ForwardBatch:
    """A ragged batch: the tokens of all requests of a step, one after the other.

    T tokens, B requests, R rows whose logits are wanted. Request b owns the tokens
    `query_start[b]:query_start[b + 1]`; they are the last ones of its `kv_lens[b]` positions. A row
    sees the key/value positions below its own `kv_end`: its own position + 1 where attention is
    causal, further where a picture sees itself both ways.
    """

    query_start: Tensor  # [B + 1] int32
    kv_lens: Tensor  # [B] int32, positions in the cache once this step's tokens are written; 0
    # marks a request that is padding
    kv_end: Tensor  # [T] int32
    slots: Tensor  # [T] int64, page * page_size + offset: where each token's key and value go
    page_table: Tensor  # [B, max_pages] int32, the pages of each request in order
    logits_rows: Tensor  # [R] int64, ascending, the tokens whose next-token logits are wanted
    kv_cache: Sequence[tuple[Tensor, Tensor]]  # per layer (keys, values), each
    # [num_pages, page_size, num_kv_heads, head_dim]
    max_query_tokens: int | None = None  # no request has more tokens; None: nobody counted
    mrope_positions: Tensor | None = None  # [3, T] int64: time, height, width; [T] where the three
    # are the same for every token; None: they are the positions themselves
    image_rows: Tensor | None = None  # [N] int64, ascending, the tokens that stand for images
    image_embeds: Tensor | None = None  # [N, hidden_size], what they have instead of embeddings
    layer_calls: dict[int, Any] = field(default_factory=dict, repr=False)  # what whole layers
    # (`sglite.layers.whole_layers`) keep from one pass over the cache to the next
    spare_memory: ops.SpareMemory = field(default_factory=ops.SpareMemory, repr=False)  # on the
    # CPU, for what is as large in the next pass
    _plans: dict[tuple, ops.AttentionPlan | None] = field(default_factory=dict, repr=False)
    _scratch: dict[int, Tensor] = field(default_factory=dict, repr=False)
    _layer_batches: dict[int, ops.LayerBatch] = field(default_factory=dict, repr=False)

    def attention_plan(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        window: int | None,
        batch_invariant: bool,
    ) -> ops.AttentionPlan | None:
        """What `sglite.ops.paged_attention` takes, made once for all layers with the same heads."""
        key = (num_heads, num_kv_heads, head_dim, window, batch_invariant)
        if key not in self._plans:
            self._plans[key] = ops.plan_attention(
                self.page_table,
                self.query_start,
                self.kv_lens,
                self.kv_end,
                page_size=self.kv_cache[0][0].shape[1],
                num_heads=num_heads,
                num_kv_heads=num_kv_heads,
                head_dim=head_dim,
                window=window,
                max_query_tokens=self.max_query_tokens,
                batch_invariant=batch_invariant,
            )
        return self._plans[key]

    def layer_batch(self, positions: Tensor) -> ops.LayerBatch:
        """What `sglite.ops.decoder_layers` takes, the same for all layers.

        Args:
            positions: [T] int64.
        """
        found = self._layer_batches.get(id(positions))
        if found is None or found.positions is not positions:
            found = self._layer_batches[id(positions)] = ops.LayerBatch(
                positions,
                self.slots,
                self.page_table,
                self.query_start,
                self.kv_lens,
                self.kv_end,
            )
        return found

    def with_images(self, embeddings: Tensor) -> Tensor:
        """The embeddings of the batch's tokens, those that stand for images replaced in place.

        Args:
            embeddings: [T, hidden_size], of the token ids.
        """
        if self.image_rows is None:
            return embeddings
        return embeddings.index_copy_(0, self.image_rows, self.image_embeds.to(embeddings.dtype))

    def scratch(self, index: int, count: int) -> Tensor:
        """Memory on the CPU for one op at a time: uint8 of at least `count` bytes.

        The layers of a pass, which run one after the other, share it.
        """
        found = self._scratch.get(index)
        if found is None or found.shape[0] < count:
            found = self.spare_memory.empty((count,), torch.uint8)
            self._scratch[index] = found
        return found

    @property
    def batch_size(self) -> int:
        """The number of requests."""
        return self.kv_lens.shape[0]


def take_rows(x: Tensor, rows: Tensor) -> Tensor:
    """Some rows: [..., T, n] and [R] int64, ascending, give [..., R, n]; x where these are all."""
    return x if x.shape[-2] == rows.shape[0] else x.index_select(-2, rows)
