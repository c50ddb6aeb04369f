"""The linear layer."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sglite import _C
from sglite.ops.packed_weight import PackedWeight, pack_weight
from sglite.ops.quantized_weight import QuantizedWeight

__all__ = ["PackedWeight", "linear", "pack_weight"]

# More than that glibc takes from the system every time, and gives back. Logits of 64 rows can be:
# their pages had better be large, since each is cleared for them.
_ALWAYS_MAPPED = 32 << 20


def linear(
    x: Tensor,
    weight: PackedWeight | QuantizedWeight | Tensor | Sequence[Tensor],
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    batch_invariant: bool = False,
) -> Tensor:
    """`out[i, j] = sum over k of x[i, k] * weight[j, k], + bias[j]`, and then `+ residual[i, j]`.

    Sums are float32. On the CPU they run over ascending k, one chain for each output, whatever the
    number of rows and threads and however the weight is stored: a row's bits depend on nothing
    else. On a GPU that holds with `batch_invariant`; without it, many rows are left to torch. The
    sum with the bias is rounded to the result's dtype; the residual is added to the rounded value
    and the sum rounded again, so that fusing it changes no bit.

    Args:
        x: [..., k], float32, bfloat16 or float16; rows evenly apart, a row's elements side by side.
        weight: [n, k] of the dtype of `x`: packed (fastest on the CPU, which alone takes it), plain
            with a row's elements side by side, or up to 16 plain tensors whose rows follow one
            another. Or quantised, on the CPU: each group of k has a sum of its own then, which is
            scaled and added to the others, ascending as well.
        bias: [n], the dtype of `x`.
        residual: [..., n], the dtype of the result.
        out_dtype: torch.float32 keeps the sums as they are; the default is the dtype of `x`.
        out: where to write; may be `residual`, but must not overlap `x`. Allocated when absent.
        batch_invariant: on a GPU, one arithmetic for every number of rows.

    Returns:
        `out`, [..., n].

    Raises:
        ValueError: a shape, stride or dtype differs from the above; the message names it.
    """
    if is_of_panels(weight):
        n = weight.n
    elif isinstance(weight, Tensor):
        n = weight.shape[0]
        weight = (weight,)
    else:
        n = sum(segment.shape[0] for segment in weight)
    if out is None:
        out = x.new_empty((*x.shape[:-1], n), dtype=out_dtype)
        if out.nbytes > _ALWAYS_MAPPED and not out.is_cuda:
            _C.advise_huge_pages(out)
    elif out_dtype is not None and out.dtype != out_dtype:
        raise ValueError(f"linear: out: expected {out_dtype} (out_dtype), got {out.dtype}")
    if is_of_panels(weight):
        linear_of_panels(out, x, weight, bias, residual)
    elif x.is_cuda and not kernel_runs(x, weight, batch_invariant):
        _matrix_product(out, x, weight, bias, residual)
    else:
        _C.linear_plain(out, x, weight, bias, residual, _workspace(x))
    return out


def is_of_panels(weight: object) -> bool:
    """Whether a weight is stored in the CPU's own layout."""
    kind = type(weight)
    return kind is PackedWeight or kind is QuantizedWeight


def linear_of_panels(
    out: Tensor,
    x: Tensor,
    weight: PackedWeight | QuantizedWeight,
    bias: Tensor | None,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> None:
    """`linear` into `out`, over a weight of the CPU's own layout.

    With an activation it is `gated_linear`, whose weight has a multiple of 64 rows; `out` is
    [..., n / 2] then, and there is no residual.
    """
    if type(weight) is PackedWeight:
        arguments = weight.storage, weight.n, weight.k, bias, residual, _workspace(x), activation
        _C.linear_packed(out, x, *arguments)
        return
    if weight.order is not None:
        x = x.index_select(-1, weight.order)
    workspace = _bytes(_C.linear_quantized_workspace(x, weight.layout.group_size))
    _C.linear_quantized(out, x, weight.arguments, bias, residual, workspace, activation)


def kernel_runs(x: Tensor, weight: Sequence[Tensor], batch_invariant: bool) -> bool:
    """Whether the CUDA kernel for few rows does `linear`, and not torch.

    The kernel reads every weight once for up to 64 rows and is bound by that; from some number of
    rows on, the products take longer than the reading, and cuBLAS's larger tiles are faster.

    Args:
        x: [..., k].
        weight: plain tensors, [n, k] together.
        batch_invariant: for every number of rows, then; raises ValueError where it cannot.
    """
    width = x.shape[-1]
    if not batch_invariant and x.numel() > _MOST_KERNEL_ROWS * width:
        return False
    if _C.linear_takes(x, weight):
        return True
    if batch_invariant and x.is_cuda:
        raise ValueError(
            f"linear: batch_invariant: expected bfloat16 or float16 rows that start at multiples "
            f"of 16 bytes, got {x.dtype}{list(x.shape)}"
        )
    return False


_MOST_KERNEL_ROWS = 16


def _workspace(x: Tensor) -> Tensor | None:
    return _bytes(_C.linear_workspace(x))


def _bytes(size: int) -> Tensor | None:
    return torch.empty(size, dtype=torch.uint8) if size else None


def _matrix_product(
    out: Tensor,
    x: Tensor,
    weight: Sequence[Tensor],
    bias: Tensor | None,
    residual: Tensor | None,
) -> None:
    """`linear` through torch, into `out`; rounds where the kernels round."""
    rows = x.reshape(-1, x.shape[-1])
    out_rows = out.view(-1, out.shape[-1])
    # The residual may be what is written to.
    to = torch.empty_like(out_rows) if residual is not None else out_rows
    start = 0
    for segment in weight:
        stop = start + segment.shape[0]
        part = to[:, start:stop]
        if out.dtype != x.dtype:
            torch.mm(rows, segment.T, out_dtype=out.dtype, out=part)
            if bias is not None:
                part += bias[start:stop]
        elif bias is not None:
            torch.addmm(bias[start:stop], rows, segment.T, out=part)
        else:
            torch.mm(rows, segment.T, out=part)
        start = stop
    if residual is not None:
        torch.add(to, residual.reshape(to.shape), out=out_rows)
