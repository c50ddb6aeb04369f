"""Linear layers together with the norm in front of them and the gated activation behind them.

Each gives the same bits as the ops that it is made of, one after the other. On the CPU the gated
activation is the end of the linear layer. On a GPU a few rows go through one kernel, in which the
norm is worked out by every block for itself while the first weights are on their way.
"""

from torch import Tensor

from sglite import _C
from sglite.ops.activation import gelu_and_mul, silu_and_mul
from sglite.ops.linear import is_of_panels, kernel_runs, linear, linear_of_panels
from sglite.ops.norm import rms_norm
from sglite.ops.packed_weight import PANEL_COLUMNS, PackedWeight
from sglite.ops.quantized_weight import QuantizedWeight

# Every block normalises all rows, which pays while they are few: one, or some short ones.
_MOST_NORM_ROWS = 8
_MOST_NORM_ELEMENTS = 4096
_MOST_NORM_WIDTH = 16384


def gated(x: Tensor, activation: str) -> Tensor:
    """`act(gate) * up`, `gate, up = x.chunk(2, -1)`; see `silu_and_mul` and `gelu_and_mul`.

    Args:
        x: [..., 2 * width].
        activation: "silu", "gelu" or "gelu_tanh".

    Returns:
        [..., width].
    """
    if activation == "silu":
        return silu_and_mul(x)
    if activation in ("gelu", "gelu_tanh"):
        return gelu_and_mul(x, "tanh" if activation == "gelu_tanh" else "none")
    raise ValueError(
        f"gated: activation: expected 'silu', 'gelu' or 'gelu_tanh', got {activation!r}"
    )


def norm_linear(
    x: Tensor,
    norm_weight: Tensor,
    epsilon: float,
    weight: PackedWeight | QuantizedWeight | Tensor,
    bias: Tensor | None = None,
    *,
    weight_offset: float = 0.0,
    batch_invariant: bool = False,
) -> Tensor:
    """`linear(rms_norm(x, norm_weight, epsilon), weight, bias)`.

    Args:
        x: [..., k], float32, bfloat16 or float16; rows evenly apart, a row's elements side by side.
        norm_weight, epsilon, weight_offset: see `rms_norm`.
        weight: [n, k] of the dtype of `x`, packed, quantised or plain.
        bias: [n], the dtype of `x`.
        batch_invariant: see `linear`.

    Returns:
        [..., n], the dtype of `x`.
    """
    if not (_kernel_runs(x, weight, batch_invariant) and _norm_fits(x, norm_weight)):
        normed = rms_norm(x, norm_weight, epsilon, weight_offset=weight_offset)
        return linear(normed, weight, bias, batch_invariant=batch_invariant)
    out = x.new_empty((*x.shape[:-1], weight.shape[0]))
    _C.linear_fused(out, x, weight, bias, None, norm_weight, epsilon, weight_offset, None)
    return out


def gated_linear(
    x: Tensor,
    weight: PackedWeight | QuantizedWeight | Tensor,
    bias: Tensor | None = None,
    *,
    activation: str,
    batch_invariant: bool = False,
) -> Tensor:
    """`gated(linear(x, weight, bias), activation)`.

    Args:
        x: [..., k], float32, bfloat16 or float16; rows evenly apart, a row's elements side by side.
        weight: [2 * width, k] of the dtype of `x`, packed, quantised or plain: gate, then up.
        bias: [2 * width], the dtype of `x`.
        activation: "silu", "gelu" or "gelu_tanh".
        batch_invariant: see `linear`.

    Returns:
        [..., width], the dtype of `x`.
    """
    # Gate and up are whole panels, or the activation is a pass of its own.
    if is_of_panels(weight) and weight.n % (2 * PANEL_COLUMNS) == 0:
        out = x.new_empty((*x.shape[:-1], weight.n // 2))
        linear_of_panels(out, x, weight, bias, activation=activation)
        return out
    if not _kernel_runs(x, weight, batch_invariant):
        return gated(linear(x, weight, bias, batch_invariant=batch_invariant), activation)
    out = x.new_empty((*x.shape[:-1], weight.shape[0] // 2))
    _C.linear_fused(out, x, weight, bias, None, None, 0.0, 0.0, activation)
    return out


def norm_gated_linear(
    x: Tensor,
    norm_weight: Tensor,
    epsilon: float,
    weight: PackedWeight | QuantizedWeight | Tensor,
    bias: Tensor | None = None,
    *,
    activation: str,
    weight_offset: float = 0.0,
    batch_invariant: bool = False,
) -> Tensor:
    """`gated_linear(rms_norm(x, norm_weight, epsilon), weight, bias)`.

    Arguments and result as for `norm_linear` and `gated_linear`.
    """
    if not (_kernel_runs(x, weight, batch_invariant) and _norm_fits(x, norm_weight)):
        normed = rms_norm(x, norm_weight, epsilon, weight_offset=weight_offset)
        return gated_linear(
            normed, weight, bias, activation=activation, batch_invariant=batch_invariant
        )
    out = x.new_empty((*x.shape[:-1], weight.shape[0] // 2))
    _C.linear_fused(out, x, weight, bias, None, norm_weight, epsilon, weight_offset, activation)
    return out


def _kernel_runs(
    x: Tensor, weight: PackedWeight | QuantizedWeight | Tensor, batch_invariant: bool
) -> bool:
    return isinstance(weight, Tensor) and kernel_runs(x, (weight,), batch_invariant)


def _norm_fits(x: Tensor, norm_weight: Tensor) -> bool:
    elements, width = x.numel(), x.shape[-1]
    return (
        elements <= max(width, min(_MOST_NORM_ROWS * width, _MOST_NORM_ELEMENTS))
        and width <= _MOST_NORM_WIDTH
        and norm_weight.data_ptr() % 16 == 0
    )
