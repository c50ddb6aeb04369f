"""Whole decoder layers in one call, on the CPU.

What a step costs beside its arithmetic is mostly the way from one op to the next, through an
interpreter that the weights have displaced from the caches: here it is gone once for all layers
instead of nine times for each.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sglite import _C
from sglite.ops.packed_weight import PackedWeight
from sglite.ops.quantized_weight import QuantizedWeight


class NormPart(NamedTuple):
    """What `rms_norm` takes beside the rows."""

    weight: Tensor
    epsilon: float
    weight_offset: float


class LinearPart(NamedTuple):
    """What `linear` takes beside the rows: a weight [n, k] and a bias."""

    weight: tuple  # the `arguments` of a `PackedWeight` or a `QuantizedWeight`
    bias: Tensor | None

    @classmethod
    def of(cls, weight: PackedWeight | QuantizedWeight, bias: Tensor | None) -> "LinearPart | None":
        """The part with this weight; None where the op does not take it.

        That is a weight whose columns are stored in another order, which those of x have to be
        brought into first.
        """
        if type(weight) is QuantizedWeight and weight.order is not None:
            return None
        return cls(weight.arguments, bias)


class AttentionPart(NamedTuple):
    """What `rope_and_write_kv` and `paged_attention` take beside the tensors of a batch."""

    q_norm: Tensor | None
    k_norm: Tensor | None
    epsilon: float
    weight_offset: float
    interleaved: bool
    scale: float
    window: int | None
    soft_cap: float | None


class LayerParts(NamedTuple):
    """A layer: norm, attention, norm, gated MLP, each pair with a residual around it."""

    input_norm: NormPart
    qkv: LinearPart  # [(heads + 2 * kv_heads) * head_dim, hidden]
    attention: AttentionPart
    output: LinearPart  # [hidden, heads * head_dim]
    post_norm: NormPart
    gate_up: LinearPart  # [2 * width, hidden]: gate, then up
    activation: str  # as in `gated`
    down: LinearPart  # [hidden, width]


class LayerBatch(NamedTuple):
    """The batch that `rope_and_write_kv` and `paged_attention` take: T tokens of B requests."""

    positions: Tensor  # [T] int64
    slots: Tensor  # [T] int64
    page_table: Tensor  # [B, max_pages] int32
    query_start: Tensor  # [B + 1] int32
    kv_lens: Tensor  # [B] int32
    kv_end: Tensor  # [T] int32


class LayerCall(NamedTuple):
    """A layer and what of the world around it is its own."""

    parts: LayerParts
    cos_sin: Tensor  # [max_positions, rotary_dim] float32, as for `apply_rope`
    k_cache: Tensor  # [pages, page_size, kv_heads, head_dim], the dtype of the hidden states
    v_cache: Tensor  # shaped like `k_cache`


class LayerCalls(tuple):
    """Layers for more than one call, taken apart once.

    A step of a small model would take longer to do that than for anything else but its products.
    The tensors are looked at anew in every call, and may get other memory in between.
    """

    views: _C.LayerViews

    def __new__(cls, calls: Iterable[LayerCall]) -> "LayerCalls":
        """These layers, at least one."""
        made = super().__new__(cls, calls)
        made.views = _C.LayerViews(made, made)
        return made


def decoder_layers(
    x: Tensor,
    batch: LayerBatch,
    layers: Sequence[LayerCall] | LayerCalls,
    scratch: Callable[[int, int], Tensor],
    rows: Tensor | None = None,
) -> Tensor:
    """`h = x + output(attention(qkv(norm(x))))`, `x = h + down(activation(gate_up(norm(h))))`, ...

    The bits of `rms_norm`, `linear`, `rope_and_write_kv`, `paged_attention`, `linear` with its
    residual, `rms_norm`, `linear`, `gated` and `linear` with its residual, one after the other.

    Args:
        x: [T, hidden], contiguous, float32, bfloat16 or float16, on the CPU; not changed.
        batch: whose tokens these are.
        layers: at least one; each takes what the one before gives.
        scratch: `scratch(index, count)` gives uint8 memory of at least `count` bytes, aligned to
            64; memory of different indices (0 and 1) does not overlap.
        rows: [R] int64, ascending: the rows that the last layer gives, which does no more for the
            others than write their keys and values. None: it gives all.

    Returns:
        [R, hidden], or [T, hidden] without `rows`; a new tensor.

    Raises:
        ValueError: a shape or dtype does not fit, or `rows` do not ascend; the message names it.
        IndexError: a position or slot that does not exist; if it is the first layer's, no cache has
            been changed.
    """
    if type(layers) is not LayerCalls:
        layers = LayerCalls(layers)
    out = torch.empty_like(x) if rows is None else x.new_empty((rows.shape[0], *x.shape[1:]))
    _C.decoder_layers(out, x, batch, layers, layers.views, scratch, rows)
    return out
