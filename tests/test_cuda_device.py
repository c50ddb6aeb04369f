"""The way from torch to a CUDA kernel of the extension: streams, graphs, refusals."""

import pytest
import torch

from sglite import _C

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


@pytest.fixture
def out():
    if not _C.cuda_architectures:
        pytest.fail("there is a GPU, but the extension was built without CUDA: SGLITE_CUDA=1")
    return torch.zeros(1, dtype=torch.int32, device="cuda")


@pytest.mark.cuda
@needs_gpu
def test_the_code_that_runs_is_built_for_this_gpu(out):
    _C.cuda_running_architecture(out)
    major, minor = torch.cuda.get_device_capability()
    assert out.item() == major * 100 + minor * 10


@pytest.mark.cuda
@needs_gpu
def test_a_kernel_runs_on_torchs_current_stream(out):
    stream = torch.cuda.Stream()
    busy = torch.randn(4096, 4096, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        for _ in range(50):  # keeps this stream, and it alone, busy for a while
            busy = busy @ busy
            busy /= busy.norm()
        _C.cuda_running_architecture(out)
        assert not stream.query(), "the stream should still be busy"
    assert torch.cuda.default_stream().query()
    stream.synchronize()
    assert out.item() > 0


@pytest.mark.cuda
@needs_gpu
def test_a_kernel_is_captured_into_a_graph(out):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _C.cuda_running_architecture(out)
    assert out.item() == 0, "capture must not run the kernel"
    graph.replay()
    torch.cuda.synchronize()
    assert out.item() > 0


@pytest.mark.cuda
@needs_gpu
def test_wrong_tensors_are_refused_by_name(out):
    with pytest.raises(ValueError, match="running_architecture: out: expected int32"):
        _C.cuda_running_architecture(out.long())
    with pytest.raises(ValueError, match="on a CUDA device"):
        _C.cuda_running_architecture(out.cpu())
