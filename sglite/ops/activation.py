"""Gated activations."""

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
