"""Our attention behind Hugging Face's `AttentionInterface`.

A Hugging Face attention module hands its queries, keys and values to the function that its config
names. The function registered here finds what it needs on the module itself: while a model is
probed its recorder, and from then on the layer's `AttentionSlot`. No mask function is registered
under `IMPLEMENTATION`, so that Hugging Face makes no mask: what a token sees is in the batch.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface

from sglite.interface.errors import UnsupportedModelError
from sglite.layers.attention import RadixAttention
from sglite.layers.forward_batch import ForwardBatch

#: The name of our attention, as a config's `_attn_implementation` has it.
IMPLEMENTATION = "sglite"
#: The same, with masks that tell the recorder of a probe what they would show.
PROBED_IMPLEMENTATION = "sglite_probe"
#: Attributes of an attention module.
SLOT, RECORDER = "sglite_attention", "sglite_recorder"


class RunningBatch:
    """The batch that a model's forward is working on, one for each thread.

    The engine of an `LLM` and those of a check beside it may run one model at the same time.
    """

    def __init__(self):
        self._threads = threading.local()

    @property
    def batch(self) -> ForwardBatch:
        """The batch of this thread's forward."""
        return self._threads.batch

    @property
    def positions(self) -> Tensor:
        """Its tokens' positions, [T] int64."""
        return self._threads.positions

    @contextmanager
    def of(self, batch: ForwardBatch, positions: Tensor) -> Iterator[None]:
        """Sets the batch for a `with` block.

        Args:
            batch: whose tokens are computed.
            positions: [T] int64, of each token in its own sequence.
        """
        self._threads.batch, self._threads.positions = batch, positions
        try:
            yield
        finally:
            self._threads.batch = self._threads.positions = None


class AttentionSlot(nn.Module):
    """What stands behind one Hugging Face attention module: its layer of the paged cache.

    Keys and values of different sizes are stored in the larger one, filled up with zeros: those
    add nothing to a score, and their outputs are cut off again.

    Args:
        attention: the layer.
        head_dim: channels of a query and key.
        v_head_dim: channels of a value.
        running: where the batch is found.
        writes: False where keys and values are those that another layer has written (Gemma 3n):
            `attention` then has that layer's id.
    """

    def __init__(
        self,
        attention: RadixAttention,
        head_dim: int,
        v_head_dim: int,
        running: RunningBatch,
        writes: bool = True,
    ):
        super().__init__()
        self.attention = attention
        self.head_dim = head_dim
        self.v_head_dim = v_head_dim
        self.writes = writes
        self._running = running

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None = None
    ) -> Tensor:
        """Gives [1, T, num_heads, v_head_dim].

        Args:
            query: [1, num_heads, T, head_dim].
            key: [1, num_kv_heads, T, head_dim].
            value: [1, num_kv_heads, T, v_head_dim].
            sinks: [num_heads], of each head a score without a key; None: none.
        """
        batch = self._running.batch
        attention = self.attention
        dtype = batch.kv_cache[attention.layer_id][0].dtype
        q = self._rows(query, dtype)
        if sinks is not None:
            sinks = sinks.detach().float().contiguous()
        if self.writes:
            k, v = self._rows(key, dtype), self._rows(value, dtype)
            out = attention(q, k, v, batch, sinks=sinks)
        else:
            out = attention.attend(q, batch, sinks)
        out = out.view(1, -1, attention.num_heads, attention.head_dim)
        if self.v_head_dim != attention.head_dim:
            out = out[..., : self.v_head_dim]
        return out if query.dtype == dtype else out.to(query.dtype)

    def _rows(self, heads: Tensor, dtype: torch.dtype) -> Tensor:
        """[1, heads, T, channels] -> [T, heads, head_dim of the cache]."""
        missing = self.attention.head_dim - heads.shape[-1]
        if missing:
            heads = functional.pad(heads, (0, missing))
        if heads.dtype != dtype:
            heads = heads.to(dtype)
        if heads.stride(-1) != 1:
            heads = heads.contiguous()
        return heads[0].transpose(0, 1)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """What Hugging Face calls: `(output [1, T, num_heads, v_head_dim], None)`.

    Args:
        module: the attention module.
        query: [1, num_heads, T, head_dim].
        key: [1, num_kv_heads, T, head_dim].
        value: [1, num_kv_heads, T, v_head_dim].
        attention_mask: None, but in a probe.
        scaling: factor on the scores; known from the probe.
        **options: `s_aux` is sinks, [num_heads], or None; the others are known from the probe.
    """
    recorder = module.__dict__.get(RECORDER)
    if recorder is not None:
        return recorder.record(module, query, key, value, attention_mask, scaling, options), None
    slot = module._modules.get(SLOT)
    if slot is None:
        raise UnsupportedModelError(
            f"{type(module).__name__} attends in this step, but did not when the model was loaded: "
            f"a model whose layers differ from step to step cannot be run"
        )
    return slot(query, key, value, options.get("s_aux")), None


def describe_mask(
    q_length: int, kv_length: int, mask_function: Any, device: Any = "cpu", **_: Any
) -> Tensor:
    """The mask of a probe: [1, 1, q_length, kv_length] bool, and the function that it is made by.

    The tensor's attribute `mask_function` tells the recorder about positions beyond the probe's.
    """
    rows = torch.arange(q_length, device=device)[:, None]
    columns = torch.arange(kv_length, device=device)[None]
    visible = mask_function(0, 0, rows, columns)
    mask = visible.expand(q_length, kv_length)[None, None].clone()
    mask.mask_function = mask_function
    return mask


def use_implementation(model: nn.Module, name: str) -> None:
    """Sets the attention of a model's text part, by the configs that its modules read."""
    text = model.config.get_text_config()
    # Not the property, which also sets the parts' configs.
    text._attn_implementation_internal = name


AttentionInterface.register(IMPLEMENTATION, attend)
AttentionInterface.register(PROBED_IMPLEMENTATION, attend)
AttentionMaskInterface.register(PROBED_IMPLEMENTATION, describe_mask)
