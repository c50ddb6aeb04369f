"""Gated activations, and the cap on logits."""

import torch
from torch import Tensor

from sglite import _C


def silu_and_mul(x: Tensor, *, out: Tensor | None = None) -> Tensor:
    """`out = silu(gate) * up` with `silu(a) = a / (1 + exp(-a))` and `gate, up = x.chunk(2, -1)`.

    Arithmetic is float32 and the product is rounded once to the tensors' own dtype (Hugging Face
    also rounds the activation before the product). (SwiGLU: Shazeer, 2020.)

    Args:
        x: [..., 2 * width], float32, bfloat16 or float16; elements of a row side by side.
        out: [..., width], where to write; allocated when absent.

    Returns:
        `out`.
    """
    if x.ndim == 2:
        if out is None:
            rows, columns = x.shape
            out = x.new_empty((rows, columns // 2))
        _C.silu_and_mul(out, x)
        return out
    if out is None:
        out = x.new_empty((*x.shape[:-1], x.shape[-1] // 2))
    _C.silu_and_mul(out.view(-1, out.shape[-1]), x.view(-1, x.shape[-1]))
    return out


def gelu_and_mul(x: Tensor, approximate: str = "none", *, out: Tensor | None = None) -> Tensor:
    """`out = gelu(gate) * up`, `gate, up = x.chunk(2, -1)`; rounding and shapes as `silu_and_mul`.

    `gelu(a) = a * Phi(a)`, where Phi is the standard normal distribution function, or with
    `approximate="tanh"` `a * (1 + tanh(sqrt(2 / pi) * (a + 0.044715 * a**3))) / 2`.
    (GEGLU: Shazeer, 2020; GELU: Hendrycks and Gimpel, 2016.)

    Args:
        x: [..., 2 * width], float32, bfloat16 or float16; elements of a row side by side.
        approximate: "none" or "tanh".
        out: [..., width], where to write; allocated when absent.

    Returns:
        `out`.
    """
    if x.ndim == 2:
        if out is None:
            rows, columns = x.shape
            out = x.new_empty((rows, columns // 2))
        _C.gelu_and_mul(out, x, approximate)
        return out
    if out is None:
        out = x.new_empty((*x.shape[:-1], x.shape[-1] // 2))
    _C.gelu_and_mul(out.view(-1, out.shape[-1]), x.view(-1, x.shape[-1]), approximate)
    return out


def soft_cap(x: Tensor, cap: float) -> Tensor:
    """`cap * tanh(x / cap)`, the same bits wherever in a tensor an element lies. (Gemma 2.)

    On the CPU torch's `tanh` is one function inside a vector loop and another behind its end, which
    moves with the number of elements and threads. Here it is made of additions, multiplications and
    divisions, which round in one way only: Lambert's continued fraction of tanh(x / 8), and
    `tanh(2 t) = 2 tanh(t) / (1 + tanh(t)^2)` three times.

    Args:
        x: float32.
        cap: above 0.

    Returns:
        A new tensor, shaped like `x`.
    """
    x = x / cap
    if x.is_cuda:
        return x.tanh_().mul_(cap)
    x.clamp_(-_TANH_IS_ONE, _TANH_IS_ONE).div_(8.0)
    square = x * x
    fraction = torch.full_like(x, _LAMBERT[0])
    for odd in _LAMBERT[1:]:
        fraction = torch.div(square, fraction, out=fraction).add_(odd)
    tanh = x.div_(fraction)
    for _ in range(3):
        torch.mul(tanh, tanh, out=square).add_(1.0)
        tanh.mul_(2.0).div_(square)
    return tanh.mul_(cap)


# From here on float32's tanh is 1.
_TANH_IS_ONE = 9.1
# The odd numbers of `tanh(x) = x / (1 + x^2 / (3 + x^2 / (5 + ...)))`, from the innermost on: for
# |x| up to 9.1 / 8 the error is below float32's last bit. (Lambert, 1768.)
_LAMBERT = (13.0, 11.0, 9.0, 7.0, 5.0, 3.0, 1.0)
