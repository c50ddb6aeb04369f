"""Decode steps as CUDA graphs, one for each size of batch."""

import bisect
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from sglite import ops
from sglite.engine.decode_runner import DecodeRunner
from sglite.engine.decode_state import DecodeState
from sglite.engine.drawn_tokens import DrawnTokens
from sglite.engine.graph_capture import GraphPool, HostAccess
from sglite.engine.scheduler import ScheduledRequest, Step

# How far the logits of a replay may be from those of the same step run kernel by kernel, as a share
# of the largest logit: libraries may choose other kernels for the same product.
_TOLERANCE = 0.02
# Captures that may fail for no reason of the model's: another thread may have disturbed them.
_MOST_FAILURES = 3


class Graph(Protocol):
    """A function's work, recorded: a `CapturedGraph`, or a test's stand-in."""

    result: Tensor

    def replay(self) -> None:
        """Does the work again."""


class DecodeGraphs(DecodeRunner):
    """Runs steps in which every request gets its next token, each as one graph from the ids fed to
    the ids drawn.

    Batches are padded to the next of a few sizes. The graph of a size is captured when it is first
    needed, and its first replay compared with the same step run kernel by kernel. A model that
    cannot be captured, or whose replay differs, is warned about once and runs without from then on;
    with a class attribute `cuda_graphs = False` a model is never captured.

    The graph samples as if no request had token edits or logits processors. Where some have, the
    step's tokens are drawn again from the graph's logits.

    Args:
        *arguments, **limits: as of `DecodeRunner`.
        capture: makes a graph of a function.
    """

    def __init__(
        self,
        *arguments: Any,
        capture: Callable[[Callable[[], Tensor]], Graph] | None = None,
        **limits: int,
    ):
        super().__init__(*arguments, **limits)
        self._sizes = _batch_sizes(self._max_requests)
        self._capture = capture or GraphPool().capture
        self._state: DecodeState | None = None
        self._workspace: Tensor | None = None
        self._graphs: dict[int, Graph] = {}
        self._num_failures = 0
        self._works = getattr(self._model, "cuda_graphs", True)

    def takes(self, step: Step) -> bool:
        """As `DecodeRunner` has it."""
        return self._works and len(step.items) <= self._max_requests and step.only_decodes

    def launch(self, step: Step, drawn: Tensor | None, sources: Sequence[int]) -> DrawnTokens:
        """As `DecodeRunner` has it."""
        items = step.items
        states = self._sampler.states([item.request for item in items], self._vocab_size)
        if self._state is None:
            self._state = self._make_state()
        self._state.set(items, states, drawn, sources)
        size = self._sizes[bisect.bisect_left(self._sizes, len(items))]
        graph = self._graphs.get(size)
        if graph is None:
            logits = self._run_first(size)
        else:
            graph.replay()
            logits = graph.result
        return self._drawn(items, states, logits[: len(items)])

    def rest(self) -> None:
        """As `DecodeRunner` has it; graphs stay."""
        if self._state is not None:
            self._state.forget()

    def close(self) -> None:
        """As `DecodeRunner` has it."""
        self._graphs.clear()
        self._model = self._state = self._workspace = None

    def _drawn(self, items: Sequence[ScheduledRequest], states, logits: Tensor) -> DrawnTokens:
        token_ids, status = self._state.token_ids[: len(items)], self._state.status[: len(items)]
        indices = [item.output_index for item in items]
        if not any(state.has_edits or state.processors for state in states):
            return self._sampler.follow(logits, states, token_ids, status, indices)
        drawn = self._sampler.draw(logits, [item.request for item in items], indices)
        token_ids.copy_(drawn.token_ids)
        return drawn

    def _step(self, size: int) -> Tensor:
        """The whole step on the first `size` rows; gives the logits, [size, vocab_size] float32."""
        rows = self._state.rows(size, self._pool.layers, self._spare_memory)
        return self._state.step(self._model, rows, self._sampling_workspace)

    def _sampling_workspace(self, logits: Tensor) -> Tensor:
        """The same for all sizes, as graphs keep its address."""
        if self._workspace is None:
            self._workspace = ops.sampling_workspace(
                logits.shape[1], rows=self._sizes[-1], device=logits.device
            )
        return self._workspace

    def _run_first(self, size: int) -> Tensor:
        """Runs the step kernel by kernel, then captures it; gives the logits."""
        saved = self._state.save()
        expected = self._step(size)
        self._state.restore(saved)
        try:
            graph = self._capture(lambda: self._step(size))
        except RuntimeError as error:
            with HostAccess() as access:
                logits = self._step(size)
            self._num_failures += 1
            if access.found is not None:
                self._give_up(f"the host takes part in {access.found}")
            elif self._num_failures == _MOST_FAILURES:
                first_line = str(error).partition("\n")[0]
                self._give_up(f"capture failed {_MOST_FAILURES} times: {first_line}")
            return logits
        graph.replay()
        if not _agree(graph.result, expected):
            self._give_up("its first replay differs from the same step run kernel by kernel")
            self._state.restore(saved)
            return self._step(size)
        self._graphs[size] = graph
        return graph.result

    def _give_up(self, reason: str) -> None:
        self._works = False
        self._graphs.clear()
        warnings.warn(
            f"{type(self._model).__name__} runs without CUDA graphs, and so slower: {reason}. "
            f"A class attribute `cuda_graphs = False` says that this is meant.",
            RuntimeWarning,
            stacklevel=2,
        )


def _batch_sizes(max_requests: int) -> list[int]:
    """1, 2, 4, then in steps of a quarter of the next power of two, and the largest batch itself.

    A row more than needed costs a decode step next to nothing, a graph memory and a capture.
    """
    sizes = [1, 2, 4]
    while sizes[-1] < max_requests:
        step = max(4, (1 << sizes[-1].bit_length()) // 4)
        sizes.append(sizes[-1] + step)
    return [size for size in sizes if size < max_requests] + [max_requests]


def _agree(found: Tensor, expected: Tensor) -> bool:
    """Whether two float32 tensors differ by no more than rounding. Waits for the device."""
    scale = expected.nan_to_num(0.0, 0.0, 0.0).abs().max()
    return torch.allclose(found, expected, rtol=0.0, atol=_TOLERANCE * float(scale), equal_nan=True)
