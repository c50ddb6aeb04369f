"""The GPU that these tests run on: a real one, or the emulator where it was built for that."""

import os

import pytest
import torch

from sglite import _C

IS_EMULATED = _C.cuda_architectures == "emulated"


def pytest_collection_modifyitems(items):
    for item in items:
        if "/cuda/" in item.nodeid:
            item.add_marker(pytest.mark.cuda)


@pytest.fixture(scope="session")
def gpu():
    """Where the tensors of a test lie. Ops on them run the CUDA kernels."""
    if IS_EMULATED:
        _C.emulate_cuda(True)
        yield torch.device("cpu")
        _C.emulate_cuda(False)
    elif not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU, or the emulator: make test-emulated")
    elif not _C.cuda_architectures:
        pytest.fail("there is a GPU, but the extension was built without CUDA: SGLITE_CUDA=1")
    else:
        yield torch.device("cuda")


@pytest.fixture(scope="session")
def engine_device():
    """Where whole models run: "cuda". `SGLITE_ENGINE_TESTS=cpu` tries the tests out on the CPU."""
    if os.environ.get("SGLITE_ENGINE_TESTS"):
        return os.environ["SGLITE_ENGINE_TESTS"]
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    if not _C.cuda_architectures:
        pytest.fail("there is a GPU, but the extension was built without CUDA: SGLITE_CUDA=1")
    return "cuda"


@pytest.fixture
def needs_gpu(engine_device):
    """For what has no counterpart on the CPU."""
    if engine_device != "cuda":
        pytest.skip("needs an NVIDIA GPU")
