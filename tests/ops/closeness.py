"""How near a kernel has to come to its reference.

The oracle is the reference in float32 on the same (already rounded) inputs. A kernel's error may be
at most twice that of the reference run in the kernel's own dtype, plus a few float32 roundings,
which is all that is left when the dtype is float32 itself.
"""

import torch
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def assert_close(actual: Tensor, low_precision: Tensor, exact: Tensor, roundings: float = 16):
    """Checks `actual` against `exact` (float32), measured by the error of `low_precision`."""
    assert actual.dtype == low_precision.dtype
    assert actual.shape == exact.shape
    assert torch.isfinite(actual).all()
    exact = exact.double()
    size = exact.abs().max().clamp(min=1e-30)
    error = (actual.double() - exact).abs().max() / size
    allowed = (low_precision.double() - exact).abs().max() / size
    floor = roundings * torch.finfo(torch.float32).eps
    if actual.dtype != torch.float32:  # storing the result costs half a unit in the last place
        floor += torch.finfo(actual.dtype).eps / 2
    assert error <= 2 * allowed + floor, f"error {error:.3e}, allowed {2 * allowed + floor:.3e}"
