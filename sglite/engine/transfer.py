"""Between host and device, without making either wait."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

# Where arrays start in a common buffer: good for any vector load.
_ALIGNMENT = 64
# Bytes up to which what lies between tensors is copied along.
_SMALL = 1 << 14


def upload(arrays: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """The arrays as tensors on `device`, on a GPU by a single copy that the host does not wait for.

    On the CPU the tensors share the arrays' memory.
    """
    if device.type == "cpu":
        return [torch.from_numpy(array) for array in arrays]
    offsets = np.cumsum([0, *(-(-array.nbytes // _ALIGNMENT) * _ALIGNMENT for array in arrays)])
    # Pinned memory comes from torch's cache, which gives it to nobody else before it is copied.
    staging = torch.empty(int(offsets[-1]), dtype=torch.uint8, pin_memory=True)
    host = staging.numpy()
    for array, offset in zip(arrays, offsets, strict=False):
        host[offset : offset + array.nbytes] = array.reshape(-1).view(np.uint8)
    buffer = staging.to(device, non_blocking=True)
    return [
        buffer[offset : offset + array.nbytes].view(torch_dtype(array.dtype)).view(array.shape)
        for array, offset in zip(arrays, offsets.tolist(), strict=False)
    ]


def torch_dtype(dtype: np.dtype) -> torch.dtype:
    """Torch's name of one of numpy's types, as both have it."""
    return getattr(torch, dtype.name)


class Download:
    """Copies of tensors on their way to the host; the tensors may change at once.

    Args:
        tensors: on one device.
    """

    def __init__(self, tensors: Sequence[Tensor]):
        self._event = None
        if not tensors or not tensors[0].is_cuda:
            self._host = [tensor.clone() for tensor in tensors]
        else:
            self._host = _copy_to_pinned(tensors)
            self._event = torch.cuda.Event()
            self._event.record()

    def wait(self) -> list[Tensor]:
        """The tensors on the host, once they are there."""
        if self._event is not None:
            self._event.synchronize()
        return self._host


def _copy_to_pinned(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies that are under way; neighbours in one buffer go by a single copy.

    A device that changes between computing and copying does neither for a while.
    """
    storage = tensors[0].untyped_storage()
    begins = [tensor.storage_offset() * tensor.itemsize for tensor in tensors]
    begin = min(begins)
    end = max(start + tensor.nbytes for start, tensor in zip(begins, tensors, strict=True))
    shared = all(tensor.untyped_storage().data_ptr() == storage.data_ptr() for tensor in tensors)
    if not shared or end - begin > _SMALL:
        return [_pinned(tensor) for tensor in tensors]
    whole = torch.empty(0, dtype=torch.uint8, device=tensors[0].device).set_(storage)
    host = _pinned(whole[begin:end])
    return [
        host[start - begin :][: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        for start, tensor in zip(begins, tensors, strict=True)
    ]


def _pinned(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(
        tensor, non_blocking=True
    )
