"""Between host and device, without making either wait."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

# Where arrays start in a common buffer: good for any vector load.
_ALIGNMENT = 64


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
        buffer[offset : offset + array.nbytes]
        .view(torch.from_numpy(array[:0] if array.ndim else array.reshape(1)[:0]).dtype)
        .view(array.shape)
        for array, offset in zip(arrays, offsets.tolist(), strict=False)
    ]


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
            self._host = [
                torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(
                    tensor, non_blocking=True
                )
                for tensor in tensors
            ]
            self._event = torch.cuda.Event()
            self._event.record()

    def wait(self) -> list[Tensor]:
        """The tensors on the host, once they are there."""
        if self._event is not None:
            self._event.synchronize()
        return self._host
