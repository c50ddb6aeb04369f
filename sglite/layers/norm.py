"""Normalisation."""

import torch
from torch import Tensor, nn

from sglite import ops


class RMSNorm(nn.Module):
    """`y = x / sqrt(mean(x * x) + eps) * (weight + weight_offset)` over the last axis.

    Zhang and Sennrich, 2019; rounded where Hugging Face rounds.

    Args:
        hidden_size: width of a row.
        eps: added to the mean square.
        weight_offset: 1.0 for models whose weights lie around zero (Gemma).
    """

    def __init__(self, hidden_size: int, eps: float = 1e-6, weight_offset: float = 0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size), requires_grad=False)
        self.eps = eps
        self.weight_offset = weight_offset

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """[..., hidden_size] -> the same shape.

        With a residual, `residual += x` first, in place, and the result is the pair of the
        normalised sum and the sum, as in SGLang and vLLM.
        """
        if residual is None:
            return ops.rms_norm(x, self.weight, self.eps, weight_offset=self.weight_offset)
        normed = ops.rms_norm(
            x, self.weight, self.eps, residual=residual, weight_offset=self.weight_offset
        )
        return normed, residual

    def extra_repr(self) -> str:
        """The part of the module's repr in brackets."""
        return f"{self.weight.shape[0]}, eps={self.eps}"


class LayerNorm(nn.Module):
    """`y = (x - mean(x)) / sqrt(variance(x) + eps) * weight + bias` over the last axis.

    Arithmetic is float32 and the result is rounded once; a row's bits depend on that row alone.
    (Ba et al., 2016.)

    Args:
        hidden_size: width of a row.
        eps: added to the variance.
        bias: whether there is one.
    """

    def __init__(self, hidden_size: int, eps: float = 1e-5, bias: bool = True):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(hidden_size), requires_grad=False) if bias else None
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden_size] -> the same shape."""
        return ops.layer_norm(x, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        """The part of the module's repr in brackets."""
        return f"{self.weight.shape[0]}, eps={self.eps}, bias={self.bias is not None}"
