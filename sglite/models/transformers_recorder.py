"""What the attention modules of a Hugging Face model call their attention function with."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sglite.interface.errors import UnsupportedModelError

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
