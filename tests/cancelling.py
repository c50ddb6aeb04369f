"""Weights whose sums of products all but cancel, so that another order of addition shows."""

import torch
from torch import Tensor, nn

#: What is left of the terms, about.
_LEFT = 2.0**-5
# Linear layers whose outputs get equal halves, as other layers take them; or each of their parts.
_WHOLE = (
    *("q_proj", "k_proj", "v_proj", "o_proj"),
    *("gate_proj", "up_proj", "down_proj", "c_fc", "c_proj"),
)
_STACKED = ("qkv_proj", "gate_up_proj")


def let_sums_cancel(model: nn.Module) -> None:
    """Changes the weights of a Hugging Face decoder, or of a vision model's, in place.

    What goes into a linear layer becomes [x, x]: hidden states, the heads of attention (of the
    queries too, each half over KV heads of its own, or over the only one) and the channels of MLPs
    and experts. Matrices become [h, -h (1 + r)] with small random r. What is left of a sum of large
    terms then shows in which order they were added. A head that is tied to the embedding cannot be
    changed like this; the norm in front of it is, so that its input is [x, -x (1 + r)].

    Raises:
        ValueError: a matrix that this knows nothing of.
    """
    text = getattr(model.model, "language_model", model.model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for path, parameter in text.named_parameters():
            owner, kind = path.split(".")[-2:]
            layer = owner if kind in ("weight", "bias") else kind  # experts have no modules
            if layer == "embed_tokens":
                _equal_halves(parameter.mT)
            elif "norm" in layer:
                # Norms of single heads are the same for all of them.
                if len(parameter) != getattr(text.config, "head_dim", None):
                    _equal_halves(parameter)
            elif layer in (*_WHOLE, *_STACKED):
                if kind != "bias":
                    _cancel(parameter, generator)
                rows = parameter if kind == "bias" else parameter.movedim(-2, 0)
                for part in _parts(layer, rows, text.config):
                    _equal_halves(part)
            elif layer in ("gate", "shared_expert_gate"):  # of a mixture of experts
                _cancel(parameter, generator)
            else:
                raise ValueError(f"{path} is not known here: say how its sums cancel")
        if model.lm_head.weight is text.embed_tokens.weight:
            # Gemma's norms multiply by one more than their weight.
            offset = 1.0 if type(text.norm).__name__.startswith("Gemma") else 0.0
            text.norm.weight += offset
            for parameter in text.norm.parameters():
                _cancel(parameter, generator)
            text.norm.weight -= offset
        else:
            _cancel(model.lm_head.weight, generator)


def _parts(layer: str, rows: Tensor, config) -> list[Tensor]:
    """The parts of a layer's outputs that get equal halves each."""
    kv_heads = config.num_key_value_heads
    if layer == "qkv_proj":
        heads = config.num_attention_heads
        sizes = [len(rows) // (heads + 2 * kv_heads) * count for count in (heads, kv_heads)]
        q, k, v = rows.split([*sizes, sizes[1]])
        return [q, k, v] if kv_heads > 1 else [q]
    if layer in ("k_proj", "v_proj") and kv_heads == 1:
        return []
    return list(rows.chunk(2)) if layer == "gate_up_proj" else [rows]


def _cancel(weight: Tensor, generator: torch.Generator) -> None:
    """[..., K] to [h, -h (1 + r)], in place, of such a size that sums have about the size of x."""
    first, second = weight.chunk(2, dim=-1)
    first /= _LEFT
    second.copy_(-first * (1 + _LEFT * torch.randn(first.shape, generator=generator)))


def _equal_halves(rows: Tensor) -> None:
    first, second = rows.chunk(2)
    second.copy_(first)
