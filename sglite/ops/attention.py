"""Attention over a paged key/value cache."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sglite import _C


def _empty_bytes(count: int) -> Tensor:
    return torch.empty(count, dtype=torch.uint8)


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """How the attention of one batch is cut into work, on a GPU; made by `plan_attention`.

    It serves every layer with the same heads, head size and window, one layer after the other:
    they share the workspace, which also takes their partial results. Attention by a plan starts to
    read older keys while the operation before it on the stream still runs: that one may write `q`
    and the keys and values of the batch's own tokens, but no others.
    """

    workspace: Tensor  # [attention_workspace(...)] uint8
    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int | None
    max_query_tokens: int
    batch_invariant: bool


def attention_workspace(
    num_tokens: int,
    table_shape: tuple[int, int],
    *,
    page_size: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    max_query_tokens: int | None = None,
    batch_invariant: bool = False,
) -> int:
    """Bytes of workspace with which `plan_attention` plans for batches of these shapes.

    Args:
        num_tokens: T.
        table_shape: the shape of `page_table`, [B, max_pages].
        page_size, num_heads, num_kv_heads, head_dim, max_query_tokens, batch_invariant: as for
            `plan_attention`.
    """
    most = num_tokens if max_query_tokens is None else max_query_tokens
    requests, width = table_shape
    heads = (num_heads, num_kv_heads, head_dim)
    return _C.attention_workspace(
        (requests, num_tokens, width, page_size, *heads, None, most, batch_invariant)
    )


def plan_attention(
    page_table: Tensor,
    query_start: Tensor,
    kv_lens: Tensor,
    kv_end: Tensor,
    *,
    page_size: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    window: int | None = None,
    max_query_tokens: int | None = None,
    batch_invariant: bool = False,
    workspace: Tensor | None = None,
) -> AttentionPlan | None:
    """Cuts a batch's attention into units of work, on the GPU that the tensors lie on.

    One small kernel that reads the lengths from the device: captured in a CUDA graph together with
    the attention, it is right for any lengths that the same tensors hold when the graph runs. Keys
    are split at absolute positions, and all that the plan chooses is which splits, one after the
    other, are one block's work: a row's bits do not depend on that. On Hopper, though, a batch with
    enough query rows goes to a kernel that is faster and rounds in another order, unless the plan
    is `batch_invariant`. Neighbouring requests of one token whose rows of `page_table` start with
    the same pages read whole splits of these once for several.

    On the CPU, where `paged_attention` plans for itself, this gives None.

    Args:
        page_table, query_start, kv_lens, kv_end: as for `paged_attention`; a request may have no
            tokens, and a token of length 0 (padding) costs next to nothing.
        page_size, num_heads, num_kv_heads, head_dim, window: as in the calls that it is for.
        max_query_tokens: no request has more tokens in this batch; T when None. With 1 (decode) a
            kernel less is launched.
        batch_invariant: whether rows have the same bits in every batch, however prompts are cut.
        workspace: [attention_workspace(...)] uint8 on the same device, aligned to 64 bytes;
            allocated when absent.

    Raises:
        ValueError: a shape, dtype or size does not fit; the message names it.
    """
    if not _C.attention_is_planned(query_start):
        return None
    most = kv_end.shape[0] if max_query_tokens is None else max_query_tokens
    requests, width = page_table.shape
    heads = (num_heads, num_kv_heads, head_dim)
    sizes = (requests, kv_end.shape[0], width, page_size, *heads, window, most, batch_invariant)
    if workspace is None:
        count = _C.attention_workspace(sizes)
        workspace = torch.empty(count, dtype=torch.uint8, device=query_start.device)
    _C.plan_attention(workspace, page_table, query_start, kv_lens, kv_end, sizes)
    return AttentionPlan(workspace, *heads, window, most, batch_invariant)


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    query_start: Tensor,
    kv_lens: Tensor,
    kv_end: Tensor,
    scale: float,
    *,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: Tensor | None = None,
    plan: AttentionPlan | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """`out = softmax(q @ k^T * scale) @ v` over the positions that each row sees.

    A ragged batch: T tokens of B requests, prefill, chunks and decodes in one call. The tokens
    `query_start[b]:query_start[b + 1]` belong to request b and are the last ones of its
    `kv_lens[b]` positions, whose keys and values the cache already holds. Token t at position
    `i` sees the positions `p < kv_end[t]` and, with a window, of those only `p > i - window`.
    A row that sees nothing gives zeros. Positions that a row does not see are never read for it:
    what unwritten slots hold, NaN included, does not matter. (On a GPU, rows of one request that
    are computed together may see each other's NaN.)

    With `soft_cap` the scores become `soft_cap * tanh(score / soft_cap)` before the softmax
    (Gemma 2). With `sinks` a row's sum of weights has `exp(sinks[h])` added, as of a key whose
    value is zero (GPT-OSS). Query heads share KV heads in groups of `q_heads / kv_heads`
    neighbours.

    Arithmetic is float32, rounded once at the end. A row's bits depend on its query, on the keys
    and values it sees and on their positions, never on the rest of the batch, on how a prompt is
    cut into chunks, on the page table, or on the number of threads: keys are split at absolute
    positions and the parts merged in order. On a GPU this needs a plan that is `batch_invariant`.
    (Online softmax: Milakov and Gimelshein, 2018; paging: Kwon et al., 2023; split keys:
    FlashDecoding, Dao et al., 2023; prefill on Hopper: FlashAttention-3, Shah et al., 2024.)

    Args:
        q: [T, q_heads, head_dim], float32, bfloat16 or float16; channels side by side, any strides
            between tokens and heads.
        k_cache: [pages, page_size, kv_heads, head_dim], the dtype of `q`, contiguous.
        v_cache: shaped like `k_cache`.
        page_table: [B, max_pages] int32; entry i of row b is the page that holds the positions
            `i * page_size` to `(i + 1) * page_size - 1` of request b.
        query_start: [B + 1] int32, from 0 to T.
        kv_lens: [B] int32.
        kv_end: [T] int32, at most the request's `kv_lens`.
        scale: usually `head_dim ** -0.5`.
        window: how many positions up to its own a row sees; None for all.
        soft_cap: None for none.
        sinks: [q_heads] float32; None for none. On a GPU they take a slow kernel.
        plan: what `plan_attention` gave for this batch, heads and window; on a GPU one is made for
            this call when it is absent. Not looked at on the CPU.
        out: [T, q_heads, head_dim], where to write; allocated when absent.

    Returns:
        `out`.

    Raises:
        ValueError: a shape, dtype, length or page does not fit; the message names it.
    """
    if out is None:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
    tensors = (out, q, k_cache, v_cache, page_table, query_start, kv_lens, kv_end)
    options = (scale, window, soft_cap, sinks)
    if _C.attention_is_planned(q):
        heads = (q.shape[1], k_cache.shape[2], q.shape[2])
        if plan is None:
            plan = plan_attention(
                page_table,
                query_start,
                kv_lens,
                kv_end,
                page_size=k_cache.shape[1],
                num_heads=heads[0],
                num_kv_heads=heads[1],
                head_dim=heads[2],
                window=window,
            )
        elif (plan.num_heads, plan.num_kv_heads, plan.head_dim, plan.window) != (*heads, window):
            raise ValueError(
                f"paged_attention: plan: made for {plan.num_heads} heads, {plan.num_kv_heads} KV "
                f"heads of {plan.head_dim} and window {plan.window}, got {heads[0]}, {heads[1]}, "
                f"{heads[2]} and {window}"
            )
        _C.paged_attention_cuda(
            *tensors, *options, plan.workspace, plan.max_query_tokens, plan.batch_invariant
        )
    else:
        _C.paged_attention(*tensors, *options, _empty_bytes)
    return out
