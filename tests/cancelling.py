"""Weights whose sums of products all but cancel, so that another order of addition shows."""

from typing import Any

import torch
from torch import Tensor, nn

#: Factor between the terms that cancel and those that are left.
LOUD = 2.0**10
# Linear layers whose outputs get equal halves, as other layers take them; or each of their parts.
_WHOLE = (
    *("q_proj", "k_proj", "v_proj", "o_proj"),
    *("gate_proj", "up_proj", "down_proj", "c_fc", "c_proj"),
)
_STACKED = ("qkv_proj", "gate_up_proj")
_ROUTERS = ("gate", "shared_expert_gate")
_POST_NORMS = ("post_self_attn_layernorm", "post_mlp_layernorm", "post_feedforward_layernorm")


def let_sums_cancel(model: nn.Module) -> None:
    """Changes the weights of a Hugging Face decoder, or of a vision model's, in place.

    What goes into a linear layer becomes [x, x], and about half of its channels `LOUD` times as
    large as the others; matrices become [h, -h] in these channels. So the large terms of a sum
    cancel, and what is left is as small as the roundings on the way, which depend on the order.
    Small differences between large terms would not do: bfloat16's products have so few bits that
    float32 adds most of them up without any rounding.

    Hidden states are loud by the norms, heads of attention by v, and an MLP's or an expert's
    channels by the up projection. Query heads are equal in halves too, each half over KV heads of
    its own, or over the only one. A head that is tied to the embedding cannot be [h, -h]; instead
    the norm in front of it gives [x, -x].

    Raises:
        ValueError: a matrix that this knows nothing of.
    """
    text = getattr(model.model, "language_model", model.model)
    is_loud_stream = not hasattr(text.layers[0], "input_layernorm")  # no norm before attention
    with torch.no_grad():
        for path, parameter in text.named_parameters():
            owner, kind = path.split(".")[-2:]
            layer = owner if kind in ("weight", "bias") else kind  # experts have no modules
            if layer == "embed_tokens":
                _equal_halves(parameter.mT)
                if is_loud_stream:
                    _raise(parameter.mT, _loud_halves(parameter.shape[1]))
            elif layer in (*_WHOLE, *_STACKED, *_ROUTERS):
                if kind != "bias":
                    _cancel(parameter, layer, text.config)
                rows = parameter if kind == "bias" else parameter.movedim(-2, 0)
                for part in () if layer in _ROUTERS else _parts(layer, rows, text.config):
                    _shape_outputs(*part, text.config)
            elif "norm" not in layer:
                raise ValueError(f"{path} is not known here: say how its sums cancel")
        is_tied = model.lm_head.weight is text.embed_tokens.weight
        if not is_tied:
            _cancel(model.lm_head.weight, "lm_head", text.config)
        for path, norm in text.named_modules():
            if isinstance(getattr(norm, "weight", None), nn.Parameter) and "norm" in path:
                _shape_norm(text, path, norm, is_loud_stream, is_tied)


def _shape_norm(
    text: nn.Module, path: str, norm: nn.Module, is_loud_stream: bool, is_tied: bool
) -> None:
    parent, _, name = path.rpartition(".")
    if name in ("q_norm", "k_norm"):
        if len(norm.weight) != getattr(text.config, "head_dim", None):  # not of each head
            _equal_halves(norm.weight)
        return
    is_post = name in _POST_NORMS or (
        name == "post_attention_layernorm"
        and hasattr(text.get_submodule(parent), "pre_feedforward_layernorm")
    )
    is_last = norm is text.norm
    loud = _loud_halves(len(norm.weight))
    # Gemma's norms multiply by one more than their weight.
    offset = 1.0 if type(norm).__name__.startswith("Gemma") else 0.0
    norm.weight += offset
    for parameter in norm.parameters():
        _equal_halves(parameter)
        if not is_last if is_loud_stream else not is_post:
            _raise(parameter, loud)
        if is_last and is_tied:
            _, second = parameter.chunk(2)
            second[loud.chunk(2)[1]] *= -1
    norm.weight -= offset


def _parts(layer: str, rows: Tensor, config: Any) -> list[tuple[str, Tensor]]:
    """The parts of a layer's outputs, by what they are."""
    if layer == "qkv_proj":
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        sizes = [len(rows) // (heads + 2 * kv_heads) * count for count in (heads, kv_heads)]
        parts = rows.split([*sizes, sizes[1]])
        return list(zip(("q_proj", "k_proj", "v_proj"), parts, strict=True))
    if layer == "gate_up_proj":
        return list(zip(("gate_proj", "up_proj"), rows.chunk(2), strict=True))
    return [(layer, rows)]


def _shape_outputs(name: str, rows: Tensor, config: Any) -> None:
    """Equal halves, and loud channels where they go into another layer as they are."""
    kv_heads = config.num_key_value_heads
    if name not in ("k_proj", "v_proj") or kv_heads > 1:
        _equal_halves(rows)
    if name == "v_proj":
        _raise(rows, _loud(len(rows) // kv_heads).repeat(kv_heads))
    elif name in ("up_proj", "c_fc"):
        _raise(rows, _loud_halves(len(rows)))


def _cancel(weight: Tensor, layer: str, config: Any) -> None:
    """[..., K] to [h, -h] in the loud channels, in place."""
    loud = _loud_halves(weight.shape[-1])
    if layer == "o_proj":
        heads = config.num_attention_heads
        loud = _loud(weight.shape[-1] // heads).repeat(heads)
    first, second = weight.chunk(2, dim=-1)
    half = loud[: first.shape[-1]]
    second[..., half] = -first[..., half]


def _equal_halves(rows: Tensor) -> None:
    first, second = rows.chunk(2)
    second.copy_(first)


def _raise(rows: Tensor, loud: Tensor) -> None:
    rows[loud] *= LOUD


def _loud_halves(count: int) -> Tensor:
    return _loud(count // 2).repeat(2)


def _loud(count: int) -> Tensor:
    """bool[count], which of so many channels are loud; about half of them."""
    return torch.rand(count, generator=torch.Generator().manual_seed(count)) < 0.5
