"""The linear layer."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sglite import _C
from sglite.ops.packed_weight import PackedWeight, pack_weight

__all__ = ["PackedWeight", "linear", "pack_weight"]


def linear(
    x: Tensor,
    weight: PackedWeight | Tensor | Sequence[Tensor],
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """`out[i, j] = sum over k of x[i, k] * weight[j, k], + bias[j]`, and then `+ residual[i, j]`.

    Sums are float32 and run over ascending k, one chain for each output, whatever the number of
    rows and threads and however the weight is stored: a row's bits depend on nothing else. The sum
    with the bias is rounded to the result's dtype; the residual is added to the rounded value and
    the sum rounded again, so that fusing it changes no bit.

    Args:
        x: [..., k], float32, bfloat16 or float16; rows evenly apart, a row's elements side by side.
        weight: [n, k] of the dtype of `x`: packed (fastest), plain with a row's elements side by
            side, or up to 16 plain tensors whose rows follow one another.
        bias: [n], the dtype of `x`.
        residual: [..., n], the dtype of the result.
        out_dtype: torch.float32 keeps the sums as they are; the default is the dtype of `x`.
        out: where to write; may be `residual`, but must not overlap `x`. Allocated when absent.

    Returns:
        `out`, [..., n].

    Raises:
        ValueError: a shape, stride or dtype differs from the above; the message names it.
    """
    packed = type(weight) is PackedWeight
    if packed:
        n = weight.n
    elif isinstance(weight, Tensor):
        n = weight.shape[0]
        weight = (weight,)
    else:
        n = sum(segment.shape[0] for segment in weight)
    if out is None:
        out = x.new_empty((*x.shape[:-1], n), dtype=out_dtype)
    elif out_dtype is not None and out.dtype != out_dtype:
        raise ValueError(f"linear: out: expected {out_dtype} (out_dtype), got {out.dtype}")
    workspace_bytes = _C.linear_workspace(x)
    workspace = torch.empty(workspace_bytes, dtype=torch.uint8) if workspace_bytes else None
    if packed:
        _C.linear_packed(out, x, weight.storage, n, weight.k, bias, residual, workspace)
    else:
        _C.linear_plain(out, x, weight, bias, residual, workspace)
    return out
