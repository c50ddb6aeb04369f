"""RMSNorm and LayerNorm."""

import torch
from torch import Tensor
from torch.nn import functional

from sglite import _C


def rms_norm(
    x: Tensor,
    weight: Tensor,
    epsilon: float,
    *,
    residual: Tensor | None = None,
    weight_offset: float = 0.0,
    out: Tensor | None = None,
) -> Tensor:
    """`out[i] = x[i] / sqrt(mean(x * x) + epsilon) * (weight[i] + weight_offset)` for each row.

    With `residual`, `residual += x` happens first, in place, and the sum is what gets normalised.
    Arithmetic is float32; the sum with the residual and the normalised value are rounded to the
    tensors' own dtype where Hugging Face rounds them. (Zhang and Sennrich, 2019.)

    Args:
        x: [..., width], float32, bfloat16 or float16; elements of a row side by side.
        weight: [width], the dtype of `x`.
        epsilon: added to the mean square.
        residual: shaped like `x`; changed in place.
        weight_offset: 1.0 for models that store their weights around zero (Gemma).
        out: where to write; may be `x` itself. Allocated when absent.

    Returns:
        `out`, shaped like `x`.
    """
    if out is None:
        out = torch.empty_like(x)
    if x.ndim == 2:
        _C.rms_norm(out, x, weight, epsilon, weight_offset, residual)
        return out
    width = x.shape[-1]
    _C.rms_norm(
        out.view(-1, width),
        x.view(-1, width),
        weight,
        epsilon,
        weight_offset,
        None if residual is None else residual.view(-1, width),
    )
    return out


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float, *, out: Tensor | None = None
) -> Tensor:
    """`out[i] = (x[i] - mean(x)) / sqrt(variance(x) + epsilon) * weight[i] + bias[i]` for each row.

    Arithmetic is float32 and the result is rounded once. (Ba et al., 2016.) On a GPU it is torch's.

    Args:
        x: [..., width], float32, bfloat16 or float16.
        weight: [width], the dtype of `x`.
        bias: [width], the dtype of `x`; None: there is none.
        epsilon: added to the variance, the mean square of the distances from the mean.
        out: where to write; may be `x` itself. Allocated when absent.

    Returns:
        `out`, shaped like `x`.
    """
    width = x.shape[-1]
    if x.is_cuda:
        normed = functional.layer_norm(x, (width,), weight, bias, epsilon)
        return normed if out is None else out.copy_(normed)
    if out is None:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
    _C.layer_norm(out.view(-1, width), x.reshape(-1, width), weight, bias, epsilon)
    return out
