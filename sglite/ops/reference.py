"""Every op in plain torch: slow, short, and what the kernels are tested against."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sglite.ops.packed_weight import PackedWeight
from sglite.ops.quantized_weight import QuantizedLayout, QuantizedRows, QuantizedWeight
from sglite.ops.sampling import (
    INTEGERS,
    NOT_A_NUMBER,
    NOTHING_LEFT,
    REALS,
    SAMPLED,
    LogProbs,
    TokenEdits,
)


def rms_norm(
    x: Tensor,
    weight: Tensor,
    epsilon: float,
    *,
    residual: Tensor | None = None,
    weight_offset: float = 0.0,
) -> Tensor:
    """See `sglite.ops.rms_norm`."""
    if residual is not None:
        residual += x
        x = residual
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    return (normed.to(x.dtype).float() * (weight.float() + weight_offset)).to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float) -> Tensor:
    """See `sglite.ops.layer_norm`."""
    wide = x.double()
    centred = wide - wide.mean(-1, keepdim=True)
    normed = centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + epsilon)
    scaled = normed * weight.double()
    return (scaled if bias is None else scaled + bias.double()).to(x.dtype)


def linear(
    x: Tensor,
    weight: PackedWeight | QuantizedWeight | Tensor | Sequence[Tensor],
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """See `sglite.ops.linear`; also in float64."""
    wide = torch.promote_types(x.dtype, torch.float32)
    y = x.to(wide) @ plain_weight(weight).to(wide).T
    if bias is not None:
        y = y + bias.to(wide)
    y = y.to(out_dtype or x.dtype)
    return y if residual is None else y + residual


def embedding(ids: Tensor, weight: PackedWeight | QuantizedWeight | Tensor) -> Tensor:
    """See `sglite.ops.embedding`."""
    return plain_weight(weight)[ids]


def plain_weight(weight: PackedWeight | QuantizedWeight | Tensor | Sequence[Tensor]) -> Tensor:
    """A weight in any of the forms that ops take, as one tensor [n, k]."""
    if isinstance(weight, PackedWeight | QuantizedWeight):
        return weight.unpack()
    return weight if isinstance(weight, Tensor) else torch.cat(list(weight))


def quantize_rows(rows: Tensor, layout: QuantizedLayout) -> QuantizedRows:
    """See `sglite.ops.QuantizedWeight.quantize_rows`."""
    count, k = rows.shape
    groups, size = layout.num_groups(k), min(layout.group_size, k)
    padded = torch.nn.functional.pad(rows.float(), (0, groups * size - k)).view(count, groups, size)
    if layout.bits == 8:
        scales, lowest, highest = padded.abs().amax(-1) / 127, -127, 127
    else:
        largest, smallest = padded.amax(-1), padded.amin(-1)
        scales = torch.where(largest >= -smallest, largest, smallest) / -8
        lowest, highest = -8, 7
    scales = scales.to(layout.scale_dtype)
    inverse = torch.where(scales == 0, 0, 1 / scales.float())
    codes = (padded * inverse[..., None]).round().clamp(lowest, highest).to(torch.int8)
    return QuantizedRows(codes.view(count, groups * size)[:, :k], scales)


def apply_rope(
    q: Tensor, k: Tensor, positions: Tensor, cos_sin: Tensor, *, interleaved: bool = False
) -> None:
    """See `sglite.ops.apply_rope`. Cosines and sines are rounded to the dtype of `q`."""
    rotary_dim = cos_sin.shape[1]
    cos, sin = cos_sin[positions].to(q.dtype)[:, None].chunk(2, -1)
    for heads in (q, k):
        rotated = heads[..., :rotary_dim]
        if interleaved:
            first, second = rotated[..., 0::2], rotated[..., 1::2]
        else:
            first, second = rotated.chunk(2, -1)
        new_first, new_second = first * cos - second * sin, second * cos + first * sin
        first.copy_(new_first)
        second.copy_(new_second)


def silu_and_mul(x: Tensor) -> Tensor:
    """See `sglite.ops.silu_and_mul`. The activation is rounded before the product."""
    gate, up = x.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


def gelu_and_mul(x: Tensor, approximate: str = "none") -> Tensor:
    """See `sglite.ops.gelu_and_mul`. The activation is rounded before the product."""
    gate, up = x.chunk(2, -1)
    return torch.nn.functional.gelu(gate, approximate=approximate) * up


def soft_cap(x: Tensor, cap: float) -> Tensor:
    """See `sglite.ops.soft_cap`."""
    return cap * torch.tanh(x / cap)


def route(logits: Tensor, top_k: int, *, normalize: bool) -> tuple[Tensor, Tensor]:
    """See `sglite.ops.route`. Which of equal experts is taken is torch's affair."""
    weights, experts = logits.softmax(-1).topk(top_k, dim=-1)
    return (weights / weights.sum(-1, keepdim=True) if normalize else weights), experts


def mix_experts(
    x: Tensor,
    weights: Tensor,
    experts: Tensor,
    gate_up: Sequence[Tensor],
    down: Sequence[Tensor],
    *,
    activation: str,
) -> Tensor:
    """See `sglite.ops.mix_experts`. Row by row, with plain weights."""
    functions = {
        "silu": silu_and_mul,
        "gelu": gelu_and_mul,
        "gelu_tanh": lambda hidden: gelu_and_mul(hidden, "tanh"),
    }
    out = torch.zeros(x.shape, dtype=torch.float32)
    for row, (own_weights, own_experts) in enumerate(zip(weights, experts.tolist(), strict=True)):
        for weight, expert in sorted(
            zip(own_weights, own_experts, strict=True), key=lambda p: p[1]
        ):
            hidden = functions[activation](linear(x[row : row + 1], gate_up[expert]))
            out[row] += weight * linear(hidden, down[expert])[0].float()
    return out.to(x.dtype)


def write_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """See `sglite.ops.write_kv`."""
    k_cache.flatten(0, 1)[slots] = k
    v_cache.flatten(0, 1)[slots] = v


def rope_and_write_kv(
    qkv: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    *,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    epsilon: float = 1e-6,
    weight_offset: float = 0.0,
    interleaved: bool = False,
) -> Tensor:
    """See `sglite.ops.rope_and_write_kv`."""
    kv_heads, head_dim = k_cache.shape[2:]
    heads = qkv.unflatten(1, (-1, head_dim))
    q, k, v = heads.split([heads.shape[1] - 2 * kv_heads, kv_heads, kv_heads], 1)
    if q_norm is not None:
        q.copy_(rms_norm(q, q_norm, epsilon, weight_offset=weight_offset))
        k.copy_(rms_norm(k, k_norm, epsilon, weight_offset=weight_offset))
    apply_rope(q, k, positions, cos_sin, interleaved=interleaved)
    write_kv(k, v, k_cache, v_cache, slots)
    return q


def copy_kv_slots(caches: Sequence[Tensor], sources: Tensor, destinations: Tensor) -> None:
    """See `sglite.ops.copy_kv_slots`."""
    for cache in caches:
        slots = cache.flatten(0, 1)
        slots[destinations] = slots[sources]


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
) -> Tensor:
    """See `sglite.ops.paged_attention`. Rounds where Hugging Face's eager attention does."""
    out = torch.zeros_like(q)
    group = q.shape[1] // k_cache.shape[2]
    softmax_dtype = torch.promote_types(q.dtype, torch.float32)
    for b, kv_len in enumerate(kv_lens.tolist()):
        start, stop = query_start[b : b + 2].tolist()
        pages = page_table[b, : -(-kv_len // k_cache.shape[1])]
        # [kv_heads, positions, head_dim], then one copy for each query head
        k, v = (
            cache[pages].flatten(0, 1)[:kv_len].transpose(0, 1).repeat_interleave(group, 0)
            for cache in (k_cache, v_cache)
        )
        scores = q[start:stop].transpose(0, 1) @ k.transpose(1, 2) * scale
        if soft_cap is not None:
            scores = torch.tanh(scores / soft_cap) * soft_cap
        position = torch.arange(kv_len - (stop - start), kv_len)[:, None]
        key_position = torch.arange(kv_len)
        visible = key_position < kv_end[start:stop, None]
        if window is not None:
            visible &= key_position > position - window
        scores = scores.to(softmax_dtype).masked_fill(~visible, -torch.inf)
        if sinks is not None:  # one more score of each row, whose weight is left out
            column = sinks.to(softmax_dtype)[:, None, None].expand(-1, stop - start, 1)
            scores = torch.cat([scores, column], -1)
        weights = scores.softmax(-1)[..., :kv_len]
        weights = weights.masked_fill(~visible, 0.0)  # rows that see nothing
        out[start:stop] = (weights.to(q.dtype) @ v).transpose(0, 1)
    return out


def gather_tokens(input_ids: Tensor, previous_token_ids: Tensor, sources: Tensor) -> None:
    """See `sglite.ops.gather_tokens`."""
    chosen = sources >= 0
    input_ids[chosen] = previous_token_ids[sources[chosen].long()].clamp(min=0)


def advance(
    token_ids: Tensor,
    input_ids: Tensor,
    positions: Tensor,
    kv_lens: Tensor,
    kv_end: Tensor,
    slots: Tensor,
    integers: Tensor,
    page_table: Tensor,
    page_size: int,
) -> None:
    """See `sglite.ops.advance`."""
    rows = (kv_lens > 0).nonzero().flatten()
    input_ids[rows] = token_ids[rows].clamp(min=0)
    for counter in (positions, kv_lens, kv_end, integers[:, INTEGERS.index("position")]):
        counter[rows] += 1
    pages = page_table[rows, positions[rows] // page_size].long()
    slots[rows] = pages * page_size + positions[rows] % page_size


def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, ...]:
    """Four random words of 32 bits from Philox4x32-10 (Salmon et al., 2011)."""
    (a, b, c, d), (left, right) = counter, key
    for _ in range(10):
        first, second = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b = (second >> 32) ^ b ^ left, second & 0xFFFFFFFF
        c, d = (first >> 32) ^ d ^ right, first & 0xFFFFFFFF
        left, right = (left + 0x9E3779B9) & 0xFFFFFFFF, (right + 0xBB67AE85) & 0xFFFFFFFF
    return a, b, c, d


def random_uniform(seed: int, sample_index: int, position: int) -> float:
    """The number in [0, 1), a multiple of 2**-53, with which `sample` draws a token."""
    words = philox4x32(
        (position & 0xFFFFFFFF, position >> 32, sample_index, 0),
        (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF),
    )
    return (words[0] << 21 | words[1] >> 11) / 2**53


def edit_logits(row: Tensor, parameters: dict[str, float], edits: TokenEdits, r: int) -> Tensor:
    """One row [vocab] of logits after the penalties, biases and bans of row `r` of `edits`."""
    (seen, bias, allowed) = (slice(*offsets[r : r + 2].tolist()) for offsets in edits.offsets)
    edited = row.clone()
    if allowed.start < allowed.stop:
        edited = torch.full_like(row, -torch.inf)
        allowed_ids = edits.allowed_ids[allowed].long()
        edited[allowed_ids] = row[allowed_ids]
    repetition = parameters["repetition_penalty"]
    for token, count, in_prompt in edits.seen[seen].tolist():
        x = edited[token]
        if count or in_prompt:
            x = x / repetition if x > 0 else x * repetition
        if count:
            x = x - parameters["frequency_penalty"] * count - parameters["presence_penalty"]
        edited[token] = x
    for token, value in zip(
        edits.bias_ids[bias].tolist(), edits.bias_values[bias].tolist(), strict=True
    ):
        edited[token] = value if value == -torch.inf else edited[token] + value
    return edited


def sampling_probabilities(row: Tensor, parameters: dict[str, float], top_k: int) -> Tensor:
    """The exact probability [vocab], float64, with which `sample` draws each token of a row."""
    row = row.double()
    order = torch.sort(row, descending=True, stable=True).indices
    top = row[order[0]]
    if parameters["temperature"] == 0:
        weights = (torch.arange(len(row)) == 0).double()
    elif top == torch.inf:
        weights = (row[order] == top).double()
    else:
        weights = torch.exp((row[order] - top) / parameters["temperature"])
    if top_k > 0:
        weights[top_k:] = 0
    before = weights.cumsum(0) - weights
    weights[before >= parameters["top_p"] * weights.sum()] = 0
    weights[weights < parameters["min_p"]] = 0
    return torch.zeros_like(row).index_copy(0, order, weights / weights.sum())


def sample(
    logits: Tensor,
    reals: Tensor,
    integers: Tensor,
    *,
    edits: TokenEdits | None = None,
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `sglite.ops.sample`."""
    token_ids, status = [], []
    for r, row in enumerate(logits if rows is None else logits[rows]):
        parameters = dict(zip(REALS, reals[r].tolist(), strict=True))
        top_k, seed, sample_index, position = integers[r].tolist()
        edited = row if edits is None else edit_logits(row, parameters, edits, r)
        if row.isnan().any() or edited.isnan().any():
            token_ids.append(-1)
            status.append(NOT_A_NUMBER)
        elif edited.max() == -torch.inf:
            token_ids.append(-1)
            status.append(NOTHING_LEFT)
        else:
            sums = sampling_probabilities(edited, parameters, top_k).cumsum(0)
            uniform = random_uniform(seed, sample_index, position)
            token = torch.searchsorted(sums, uniform * sums[-1], right=True)
            token_ids.append(int(token))
            status.append(SAMPLED)
    return torch.tensor(token_ids), torch.tensor(status, dtype=torch.int32)


def log_probs(
    logits: Tensor, token_ids: Tensor, top_n: int = 0, *, rows: Tensor | None = None
) -> LogProbs:
    """See `sglite.ops.log_probs`."""
    logits = (logits if rows is None else logits[rows]).double()
    certain = (logits == torch.inf).any(-1, keepdim=True)
    shared = torch.where(logits == torch.inf, 0.0, -torch.inf)
    every = torch.log_softmax(torch.where(certain, shared, logits), -1)
    chosen = logits.gather(1, token_ids[:, None])
    top_ids = torch.sort(logits, descending=True, stable=True).indices[:, :top_n]
    return LogProbs(
        every.gather(1, token_ids[:, None])[:, 0].float(),
        1 + (logits > chosen).sum(-1),
        top_ids,
        every.gather(1, top_ids).float(),
    )
