"""What the layers of a Hugging Face model need, learned by running it on a handful of tokens.

Nothing is read from source, so that a class defined in a notebook is as good as one of the
library's own. One forward with a recording attention function shows every attention module's
shapes, scale, soft cap and mask. In it attention hands every token its own value, so that no token
can see another one; a second forward, of other tokens in another order, then shows whether anything
else in the model carries something from token to token, or counts positions by itself.
"""

import inspect
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sglite.interface.errors import UnsupportedModelError, foreign_errors_as
from sglite.models.transformers_attention import (
    IMPLEMENTATION,
    PROBED_IMPLEMENTATION,
    RECORDER,
    use_implementation,
)
from sglite.models.transformers_calls import CallRecord, record_calls
from sglite.models.transformers_parts import InvariantLinears
from sglite.models.transformers_recorder import AttentionFacts, AttentionRecorder

_LENGTH = 5
#: The token that both forwards hold, by its place in the first and in the second.
_FIRST_PLACE, _SECOND_PLACE = 4, 1
# A mask is looked at as far as the model's positions go, within reason.
_MOST_POSITIONS = 1 << 20
# What may differ between two places in a batch, relative to the largest: rounding.
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.03, torch.bfloat16: 0.15}


@dataclass(frozen=True)
class ProbeResult:
    """What a probe has learned.

    Attributes:
        layers: the attention modules, in the order in which they run.
        vocab_size: width of the logits.
        calls: by path, how the model's parts were called.
    """

    layers: tuple[AttentionFacts, ...]
    vocab_size: int
    calls: Mapping[str, CallRecord]


def probe(model: nn.Module, num_positions: int | None) -> ProbeResult:
    """Runs a model on a few tokens and says what its layers need.

    Args:
        model: a Hugging Face causal language model in evaluation mode, with its weights.
        num_positions: the longest context that it speaks of; None: it does not.

    Raises:
        UnsupportedModelError: a layer needs something that is not implemented, or the model reads
            from other tokens elsewhere than in attention.
    """
    count = min(num_positions or 4096, _MOST_POSITIONS)
    if count < _LENGTH:
        raise UnsupportedModelError(f"a context of {count} positions is too short to be probed")
    vocab_size = model.config.get_text_config().vocab_size
    tokens = torch.arange(7, 7 + 2 * _LENGTH) * 3 % vocab_size
    first, second = tokens[:_LENGTH], tokens[_LENGTH:].clone()
    places = torch.arange(_LENGTH)
    others = places.flip(0) % (_LENGTH - 1)
    second[_SECOND_PLACE] = first[_FIRST_PLACE]
    others[_SECOND_PLACE] = places[_FIRST_PLACE]
    use_implementation(model, PROBED_IMPLEMENTATION)
    mask = torch.ones(1, _LENGTH, dtype=torch.long)
    with record_calls(model) as calls:
        recorder, logits = _run(model, count, first, places, attention_mask=mask)
    use_implementation(model, IMPLEMENTATION)
    _check_attention_modules(model, recorder, calls)
    again, other_logits = _run(model, count, second, others)
    _check_tokens_are_apart(model, recorder, again, logits, other_logits)
    layers = tuple(call.facts for call in recorder.calls.values())
    return ProbeResult(layers, logits.shape[-1], calls)


def forward_arguments(model: nn.Module) -> dict[str, Any]:
    """Arguments of a model's forward beside ids and positions, as far as it takes them."""
    parameters = inspect.signature(model.forward).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if "position_ids" not in parameters and not takes_any:
        raise UnsupportedModelError(
            f"{type(model).__name__}.forward takes no position_ids, so that several prompts cannot "
            f"be computed in one step"
        )
    wanted = {"use_cache": False, "return_dict": True}
    return {name: value for name, value in wanted.items() if takes_any or name in parameters}


def logits_of(output: Any) -> Tensor:
    """The logits in what a model's forward gives: an output object, a dict, a tuple or a tensor."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, tuple):
        return output[0]
    return output["logits"] if isinstance(output, Mapping) else output.logits


def _run(
    model: nn.Module, count: int, token_ids: Tensor, positions: Tensor, **arguments: Any
) -> tuple[AttentionRecorder, Tensor]:
    """`run_recorded` of tokens and their positions, both [T]."""
    if "attention_mask" not in inspect.signature(model.forward).parameters:
        arguments.pop("attention_mask", None)
    return run_recorded(
        model,
        count,
        {"input_ids": token_ids[None], "position_ids": positions[None], **arguments},
    )


def run_recorded(
    model: nn.Module, count: int, arguments: Mapping[str, Any]
) -> tuple[AttentionRecorder, Tensor]:
    """One forward with a recorder on all modules; what it holds, and the logits [T, vocabulary].

    Args:
        model: a Hugging Face model.
        count: how far masks are looked at.
        arguments: of its forward, beside those of `forward_arguments`.

    Raises:
        UnsupportedModelError: a layer needs something that is not implemented, or the model fails.
    """
    recorder = AttentionRecorder(model, count)
    arguments = {**arguments, **forward_arguments(model)}
    device = next(model.parameters()).device
    arguments = {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in arguments.items()
    }
    for module in model.modules():
        module.__dict__[RECORDER] = recorder
    what = f"{type(model).__name__} fails on a few tokens with attention replaced"
    try:
        # Its rows' bits do not depend on their places, so that no expert is chosen otherwise.
        linears = InvariantLinears() if device.type == "cpu" else nullcontext()
        with foreign_errors_as(UnsupportedModelError, what), torch.inference_mode(), linears:
            output = model(**arguments)
    finally:
        for module in model.modules():
            del module.__dict__[RECORDER]
    return recorder, logits_of(output)[0]


def _check_attention_modules(
    model: nn.Module, recorder: AttentionRecorder, calls: Mapping[str, CallRecord]
) -> None:
    """Refuses modules that attend by themselves, past the attention function."""
    modules = dict(model.named_modules())
    for path in calls:
        module = modules[path]
        kind = type(module).__name__
        is_attention = "attention" in kind.lower() or "attn" in kind.lower()
        if not is_attention or not any(isinstance(part, nn.Linear) for part in module.modules()):
            continue
        inside = path + "."
        if not any(
            own == path or own.startswith(inside) or path.startswith(own + ".")
            for own in recorder.calls
        ):
            raise UnsupportedModelError(
                f"{path} ({kind}) computes attention itself instead of calling the function that "
                f"its config names (transformers' AttentionInterface), so that the KV cache cannot "
                f"be put behind it"
            )
    if not recorder.calls:
        raise UnsupportedModelError(
            f"{type(model).__name__} never called an attention function through transformers' "
            f"AttentionInterface: there is nothing to put the KV cache behind"
        )


def _check_tokens_are_apart(
    model: nn.Module,
    first: AttentionRecorder,
    second: AttentionRecorder,
    logits: Tensor,
    other_logits: Tensor,
) -> None:
    """One token, with attention to itself alone, must not notice what else is in the batch."""
    pairs = [("logits", logits[_FIRST_PLACE], other_logits[_SECOND_PLACE])]
    for path, call in first.calls.items():
        if path not in second.calls:
            raise UnsupportedModelError(
                f"{path} attends in some steps only: a model whose layers differ from step to step "
                f"cannot be run"
            )
        other = second.calls[path]
        pairs += [
            (f"{path}: {part}", here[0, :, _FIRST_PLACE], there[0, :, _SECOND_PLACE])
            for part, here, there in (
                ("queries", call.query, other.query),
                ("keys", call.key, other.key),
                ("values", call.value, other.value),
            )
        ]
        if other.facts.scaling != call.facts.scaling:
            raise UnsupportedModelError(
                f"{path} scales its scores by {call.facts.scaling:.3g} in one step and by "
                f"{other.facts.scaling:.3g} in another"
            )
    for name, here, there in pairs[1:] + pairs[:1]:
        allowed = _TOLERANCE.get(here.dtype, 1e-3)
        scale = here.float().abs().max()
        error = (here.float() - there.float()).abs().max() / scale if scale > 0 else scale
        if not error <= allowed:
            raise UnsupportedModelError(
                f"{type(model).__name__} computes a token from others elsewhere than in attention, "
                f"or from its place in the batch instead of its position (state-space, "
                f"convolution and linear-attention layers do): {name} of the same token differ by "
                f"{float(error):.1e} beside other tokens"
            )
