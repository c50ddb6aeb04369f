"""Logits processors: the callables of a request that may change its row of logits."""

import contextlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sglite.engine.failures import detach, words_of
from sglite.engine.sampling_state import SamplingState, step_error
from sglite.interface.errors import RequestError


def apply_processors(
    logits: Tensor, states: Sequence[SamplingState]
) -> tuple[Tensor, dict[int, RequestError]]:
    """The logits after the requests' processors, on a copy; by row, what went wrong."""
    if not any(state.processors for state in states):
        return logits, {}
    processed, failures = logits.clone(), {}
    for row, state in enumerate(states):
        failure = _process(processed[row], state) if state.processors else None
        if failure is not None:
            failures[row] = failure
    return processed, failures


def _process(row: Tensor, state: SamplingState) -> RequestError | None:
    """Runs the request's processors on its row, in place; returns what went wrong."""
    for processor in state.processors:
        try:
            result = processor(list(state.output_token_ids), row)
        # SystemExit too: it is the request's affair, not that of the engine's thread.
        except BaseException as error:
            failure = step_error(
                len(state.output_token_ids),
                f"the logits processor {_name(processor)} raised {words_of(error)}",
            )
            failure.__cause__ = detach(error)
            return failure
        if not isinstance(result, Tensor):
            got = type(result).__name__
        elif result.dtype != torch.float32 or result.shape != row.shape:
            got = (
                f"a {str(result.dtype).removeprefix('torch.')} tensor of shape {list(result.shape)}"
            )
        else:
            if result is not row:
                row.copy_(result.detach())
            continue
        return step_error(
            len(state.output_token_ids),
            f"the logits processor {_name(processor)} returned {got}; expected the logits, a "
            f"float32 tensor of shape {list(row.shape)}",
        )
    return None


def _name(processor: Callable) -> str:
    name = None
    with contextlib.suppress(BaseException):  # of an object that answers for another one
        name = getattr(processor, "__qualname__", None)
    return name or type(processor).__qualname__
