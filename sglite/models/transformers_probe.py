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

_LENGTH = 5
#: The token that both forwards hold, by its place in the first and in the second.
_FIRST_PLACE, _SECOND_PLACE = 4, 1
# A mask is looked at as far as the model's positions go, within reason.
_MOST_POSITIONS = 1 << 20
# What may differ between two places in a batch, relative to the largest: rounding.
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.03, torch.bfloat16: 0.15}
# Options of attention functions that change nothing in inference, or are seen to.
_HARMLESS = {
    "dropout",
    "position_ids",
    "position_embeddings",
    "cache_position",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "use_cache",
    "return_dict",
    "sliding_window",
    "softcap",
    "s_aux",
    "is_causal",
    "cache",
    "past_key_values",
    "training",
    "deterministic",
}


@dataclass(frozen=True)
class AttentionFacts:
    """What one attention module needs.

    Attributes:
        path: of the module.
        num_heads, num_kv_heads: of queries, of keys and values.
        head_dim: channels of a query and key.
        v_head_dim: channels of a value.
        scaling: factor on the scores.
        window: positions that a token sees, its own among them; None: all.
        soft_cap: of the scores; None: none.
        shares: path of the module whose keys and values it reads; None: its own.
        has_sinks: whether each head has a score without a key, a parameter of the module's.
    """

    path: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    scaling: float
    window: int | None
    soft_cap: float | None
    shares: str | None
    has_sinks: bool = False


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


@dataclass
class _Call:
    query: Tensor
    key: Tensor
    value: Tensor
    facts: AttentionFacts


class AttentionRecorder:
    """Stands where attention would, and keeps what it was called with.

    Args:
        model: whose modules hand themselves to the attention function.
        num_positions: how far masks are looked at.
    """

    def __init__(self, model: nn.Module, num_positions: int):
        self.calls: dict[str, _Call] = {}
        self._paths = {id(module): path for path, module in model.named_modules()}
        self._num_positions = num_positions
        self._windows: list[tuple[Tensor, int | None]] = []  # of masks that were looked at

    def record(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scaling: float | None,
        options: Mapping[str, Any],
    ) -> Tensor:
        """Keeps the call; gives every token its own value, [1, T, num_heads, v_head_dim]."""
        path = self._paths[id(module)]
        name = f"{path} ({type(module).__name__})"
        if path in self.calls:
            raise UnsupportedModelError(
                f"{name} attends twice in one forward; layers that share one module need a cache "
                f"for each, which is not implemented"
            )
        _check_options(name, options, query.shape[1])
        _check_shapes(name, query, key, value)
        window = options.get("sliding_window")
        if mask is not None:
            window = self._window_of(name, mask)
        elif options.get("is_causal", getattr(module, "is_causal", True)) is False:
            raise UnsupportedModelError(f"{name} lets tokens see what follows them (not causal)")
        facts = AttentionFacts(
            path=path,
            num_heads=query.shape[1],
            num_kv_heads=key.shape[1],
            head_dim=query.shape[3],
            v_head_dim=value.shape[3],
            scaling=query.shape[3] ** -0.5 if scaling is None else float(scaling),
            window=window or None,
            soft_cap=options.get("softcap") or None,
            shares=self._owner(key, value),
            has_sinks=options.get("s_aux") is not None,
        )
        self.calls[path] = _Call(query, key, value, facts)
        group = query.shape[1] // key.shape[1]
        return value.repeat_interleave(group, 1).transpose(1, 2).contiguous()

    def _owner(self, key: Tensor, value: Tensor) -> str | None:
        """The module that was called with the very same keys and values before."""
        for path, call in self.calls.items():
            same = call.key.data_ptr() == key.data_ptr() and call.value.data_ptr() == (
                value.data_ptr()
            )
            if same and call.key.shape == key.shape and call.facts.shares is None:
                return path
        return None

    def _window_of(self, name: str, mask: Tensor) -> int | None:
        """`_window`, once for each mask: layers mostly share theirs."""
        for known, window in self._windows:
            if known is mask:
                return window
        window = self._window(name, mask)
        self._windows.append((mask, window))
        return window

    def _window(self, name: str, mask: Tensor) -> int | None:
        """How far back a mask lets a token see; None: to the beginning."""
        function = getattr(mask, "mask_function", None)
        if function is None:
            raise UnsupportedModelError(
                f"{name} gets a mask of the model's own making, {list(mask.shape)}; only masks of "
                f"transformers.masking_utils (create_causal_mask and so on) can be understood"
            )
        count = self._num_positions

        def visible(position: int) -> Tensor:
            row, columns = torch.tensor([[position]]), torch.arange(count)[None]
            return function(0, 0, row, columns).expand(1, count)[0]

        seen = int(visible(count - 1).sum())
        window = None if seen == count else seen
        columns = torch.arange(count)
        for position in {0, 1, seen - 1, seen, seen + 1, count // 2, count // 3, count - 1}:
            if not 0 <= position < count:
                continue
            expected = (columns <= position) & (columns > position - seen)
            if not torch.equal(visible(position), expected):
                raise UnsupportedModelError(
                    f"{name} has a mask that is neither causal nor a sliding window (chunked "
                    f"attention, or tokens that see what follows them): not implemented"
                )
        return window


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


def _check_options(name: str, options: Mapping[str, Any], num_heads: int) -> None:
    sinks = options.get("s_aux")
    if sinks is not None and tuple(sinks.shape) != (num_heads,):
        raise UnsupportedModelError(
            f"{name} has attention sinks (s_aux) {list(sinks.shape)}; one for each of the "
            f"{num_heads} query heads is implemented"
        )
    for option, value in options.items():
        if option not in _HARMLESS and isinstance(value, Tensor):
            raise UnsupportedModelError(
                f"{name} hands {option}={list(value.shape)} to its attention, which is not "
                f"implemented" + (" (ALiBi and other biases on scores)" if "bias" in option else "")
            )


def _check_shapes(name: str, query: Tensor, key: Tensor, value: Tensor) -> None:
    shapes = [list(tensor.shape) for tensor in (query, key, value)]
    problem = None
    if any(tensor.ndim != 4 for tensor in (query, key, value)):
        problem = "expected [1, heads, tokens, channels]"
    elif query.shape[2] != key.shape[2] or key.shape[2] != value.shape[2]:
        problem = "keys and values are not those of the queries' own tokens"
    elif query.shape[3] != key.shape[3]:
        problem = "queries and keys differ in their channels"
    elif key.shape[1] != value.shape[1] or query.shape[1] % key.shape[1]:
        problem = "query heads cannot share key/value heads evenly"
    if problem:
        raise UnsupportedModelError(
            f"{name} attends with queries {shapes[0]}, keys {shapes[1]} and values {shapes[2]}: "
            f"{problem}"
        )


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
