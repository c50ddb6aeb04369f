"""Recording a function's CUDA work once, to launch it again as a whole."""

import contextlib
import gc
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# Operators whose result the host has to know before it can go on.
_WAIT_FOR_THE_DEVICE = (
    "_local_scalar_dense",
    "_unique",
    "is_nonzero",
    "item",
    "masked_select",
    "nonzero",
    "unique",
)
_COPIES = ("copy_", "_to_copy", "to")
_TORCH = Path(torch.__file__).parent
_OWN = Path(__file__).parent.parent


class HostAccess(TorchDispatchMode):
    """Watches for operators that cannot be part of a graph: the host takes part in them.

    Attributes:
        found: the first of them and the line of code that called it; None if there was none.
    """

    def __init__(self):
        super().__init__()
        self.found: str | None = None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if self.found is None and self._takes_part(func, args, result):
            self.found = f"{func.name()} ({_calling_line()})"
        return result

    @staticmethod
    def _takes_part(func, args, result) -> bool:
        name = func.name().removeprefix("aten::").partition(".")[0]
        tensors = [tensor for tensor in (*args, result) if isinstance(tensor, Tensor)]
        if name.startswith(_WAIT_FOR_THE_DEVICE):
            return any(tensor.is_cuda for tensor in tensors)
        return name in _COPIES and len({tensor.device.type for tensor in tensors}) > 1


def _calling_line() -> str:
    """Where the innermost caller outside of torch and of the engine stands."""
    frames = traceback.extract_stack()[:-2]
    for frame in reversed(frames):
        path = Path(frame.filename)
        if _TORCH not in path.parents and path.parent != _OWN / "engine":
            return f"{path.name}:{frame.lineno}: {frame.line}"
    return "unknown place"


class CapturedGraph:
    """The CUDA work of one function.

    Args:
        function: gives a float32 tensor. It runs once more, without effect on the device; what it
            allocates keeps its place in `pool`.
        pool: of `torch.cuda.graph_pool_handle()`; graphs that never run at the same time share one.

    Attributes:
        result: what the function gave, at its fixed address: good from one `replay` until another
            graph of the pool is replayed or captured.

    Raises:
        RuntimeError: something in the function cannot be captured.
    """

    def __init__(self, function: Callable[[], Tensor], pool: tuple[int, int]):
        self._graph = torch.cuda.CUDAGraph()
        with _no_collection():
            # Thread-local: other threads may launch, copy and allocate meanwhile, but not wait for
            # the whole device (which CUDA forbids) or draw random numbers on it (torch does).
            self._graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                result = function()
            except BaseException:
                _end_broken_capture(self._graph, pool)
                raise
            self._graph.capture_end()
        self.result = _alias(result)

    def replay(self) -> None:
        """Launches the work on the current stream; the interpreter's lock is free meanwhile."""
        self._graph.replay()


def _end_broken_capture(graph: torch.cuda.CUDAGraph, pool: tuple[int, int]) -> None:
    """Takes the stream and torch's allocator out of a capture that is known to have failed."""
    with contextlib.suppress(RuntimeError):
        graph.capture_end()
    # Where that raises, the allocator is left recording, and would give no memory back from now on.
    with contextlib.suppress(RuntimeError):
        torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)


class GraphPool:
    """Captures graphs that share their memory, since they never run at the same time."""

    def __init__(self):
        self._handle: tuple[int, int] | None = None

    def capture(self, function: Callable[[], Tensor]) -> CapturedGraph:
        """See `CapturedGraph`."""
        if self._handle is None:
            self._handle = torch.cuda.graph_pool_handle()
        return CapturedGraph(function, self._handle)


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Holds garbage collection off: what it frees may be CUDA's, which a capture does not stand."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


class _DeviceMemory:
    """Memory that somebody else owns, as `torch.as_tensor` takes it."""

    def __init__(self, tensor: Tensor):
        self.__cuda_array_interface__ = {
            "shape": tuple(tensor.shape),
            "typestr": "<f4",
            "data": (tensor.data_ptr(), False),
            "version": 3,
        }


def _alias(tensor: Tensor) -> Tensor:
    """The same float32 memory, without holding it: the graphs of a pool then share it."""
    return torch.as_tensor(_DeviceMemory(tensor), device=tensor.device)
