"""Where the engine runs: the CPU, or one GPU with a stream of its own."""

import contextlib
import os
from collections.abc import Iterator

import torch

from sglite import _C
from sglite.engine.leaving import empty_all_frames
from sglite.interface import checks
from sglite.interface.errors import ConfigError

# Streams that closed engines have left, by GPU: torch and its libraries keep memory for each
# stream that was ever used, so that a new engine goes on with an old one's.
_idle_streams: dict[int, list[torch.cuda.Stream]] = {}


def resolve_device(name: str) -> torch.device:
    """The device that "auto", "cpu", "cuda" or "cuda:N" means; a GPU is never passed over.

    Raises:
        ConfigError: there is no such GPU, or the extension holds no code for it.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    found = "there is a GPU" if name == "auto" else f"device={name!r} was asked for"
    if not _C.cuda_architectures:
        raise ConfigError(
            f"{found}, but the extension was built without CUDA: install it again with "
            f"SGLITE_CUDA=1 in the environment, or pass device='cpu'"
        )
    if not torch.cuda.is_available():
        raise ConfigError(
            f"{found}, but torch {torch.__version__} sees no GPU: install a torch that was built "
            f"for CUDA and an NVIDIA driver, or pass device='cpu'"
        )
    device = torch.device("cuda" if name == "auto" else name)
    if device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    if device.index >= torch.cuda.device_count():
        raise ConfigError(f"{found}, but there are {torch.cuda.device_count()} GPUs here")
    _check_architecture(device)
    return device


def resolve_num_threads(asked: int | None) -> int:
    """Torch's number, or what was asked for; more than there are processors only cost time."""
    processors = os.cpu_count() or 1
    if asked is not None and asked > processors:
        checks.refuse(
            "num_threads",
            asked,
            f"at most {processors}, the processors of this machine",
            ConfigError,
        )
    return asked or torch.get_num_threads()


def _check_architecture(device: torch.device) -> None:
    """Refuses a GPU that none of the extension's code runs on."""
    capability = torch.cuda.get_device_capability(device)
    built = _C.cuda_architectures.split(";")
    if not any(_runs_on(name, *capability) for name in built):
        own = "{}{}".format(*capability) + ("a" if capability[0] == 9 else "")
        raise ConfigError(
            f"{torch.cuda.get_device_name(device)} is of architecture {own}, but this "
            f"installation was built for {', '.join(built)}: install again with SGLITE_CUDA=1 "
            f"SGLITE_CUDA_ARCHS={own}"
        )


def _runs_on(architecture: str, major: int, minor: int) -> bool:
    """Whether code for an architecture such as "80" or "90a" runs on a GPU."""
    number = int(architecture.rstrip("af"))
    if architecture.endswith("a"):  # with features of this very architecture
        return number == 10 * major + minor
    return number // 10 == major and number % 10 <= minor


def release_after(
    error: BaseException, device: torch.device, handled: BaseException | None
) -> None:
    """Lets go of what an error's frames hold, such as weights, and gives a GPU's memory back.

    Args:
        error: what ended the making of an engine.
        device: of the engine; on the CPU a GPU is the program's own affair.
        handled: as in `empty_all_frames`.
    """
    empty_all_frames(error, handled)
    if device.type == "cuda" and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


class EngineThread:
    """The state of the threads that run an engine's steps; what it sets belongs to them alone.

    Args:
        device: of the engine.
        num_threads: of the CPU kernels.
    """

    def __init__(self, device: torch.device, num_threads: int):
        self._device = device
        self._num_threads = num_threads
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            idle = _idle_streams.setdefault(device.index, [])
            self._stream = idle.pop() if idle else torch.cuda.Stream(device)

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """Sets threads, gradient mode, device and stream."""
        _C.set_num_threads(self._num_threads)
        with torch.inference_mode(), contextlib.ExitStack() as stack:
            if self._stream is not None:
                # What other streams did before (the weights' way to the GPU) comes first.
                self._stream.wait_stream(torch.cuda.default_stream(self._device))
                stack.enter_context(torch.cuda.stream(self._stream))
            yield

    def close(self) -> None:
        """Waits for the device, gives back what nobody refers to, and leaves the stream to others.

        May be called again.
        """
        if self._stream is not None:
            self._stream.synchronize()
            torch.cuda.empty_cache()
            _idle_streams[self._device.index].append(self._stream)
            self._stream = None
