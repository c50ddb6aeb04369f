"""MLPs, gated and plain."""

import torch
from torch import Tensor, nn

from sglite import ops
from sglite.interface.errors import UnsupportedModelError
from sglite.layers.composite import add_part, is_plain, norm_linear
from sglite.layers.linear import GateUpLinear, Linear
from sglite.layers.norm import RMSNorm
from sglite.layers.porting import QuantizationConfig, add_prefix


class SiluAndMul(nn.Module):
    """`silu(gate) * up`, where gate and up are the halves of the input. (Shazeer, 2020.)"""

    def forward(self, x: Tensor) -> Tensor:
        """[..., 2 * width] -> [..., width]."""
        return ops.silu_and_mul(x)


class GeluAndMul(nn.Module):
    """`gelu(gate) * up`, where gate and up are the halves of the input. (Shazeer, 2020.)

    Args:
        approximate: "none" (the exact function) or "tanh".
    """

    def __init__(self, approximate: str = "none"):
        super().__init__()
        if approximate not in ("none", "tanh"):
            raise ValueError(f"approximate={approximate!r} is not allowed: 'none' or 'tanh'")
        self.approximate = approximate

    def forward(self, x: Tensor) -> Tensor:
        """[..., 2 * width] -> [..., width]."""
        return ops.gelu_and_mul(x, self.approximate)


# By the names that Hugging Face's `hidden_act` has for the function on the gate.
_GATED_ACTIVATIONS = {
    "silu": SiluAndMul,
    "swish": SiluAndMul,
    "gelu": GeluAndMul,
    "gelu_new": lambda: GeluAndMul("tanh"),
    "gelu_pytorch_tanh": lambda: GeluAndMul("tanh"),
}


def gated_activation(hidden_act: str) -> nn.Module:
    """The module for a config's `hidden_act`. Raises UnsupportedModelError for an unknown one."""
    if hidden_act not in _GATED_ACTIVATIONS:
        raise UnsupportedModelError(
            f"hidden_act={hidden_act!r} is not implemented; known: "
            f"{', '.join(sorted(_GATED_ACTIVATIONS))}"
        )
    return _GATED_ACTIVATIONS[hidden_act]()


class GatedMLP(nn.Module):
    """`down(act(gate(x)) * up(x))`.

    Args:
        hidden_size: width of input and output.
        intermediate_size: width of gate and up.
        hidden_act: name of the activation, as in Hugging Face's configs.
        bias: whether the projections have biases.
        quant_config, prefix: as for `Linear`.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        hidden_act: str = "silu",
        bias: bool = False,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ):
        super().__init__()
        self.gate_up_proj = GateUpLinear(
            hidden_size,
            intermediate_size,
            bias=bias,
            quant_config=quant_config,
            prefix=add_prefix("gate_up_proj", prefix),
        )
        self.act_fn = gated_activation(hidden_act)
        self.down_proj = Linear(
            intermediate_size,
            hidden_size,
            bias=bias,
            quant_config=quant_config,
            prefix=add_prefix("down_proj", prefix),
        )

    def forward(
        self, x: Tensor, residual: Tensor | None = None, norm: nn.Module | None = None
    ) -> Tensor:
        """[T, hidden_size] -> [T, hidden_size].

        Where they are given, `norm` is applied to the input and `residual` added to the result.
        """
        x = self._gate_and_up(x, norm)
        if residual is None:
            return self.down_proj(x)
        return add_part(self.down_proj, Linear, residual, x)

    def _gate_and_up(self, x: Tensor, norm: nn.Module | None) -> Tensor:
        part, activation = self.gate_up_proj, op_name(self.act_fn)
        if activation is None or not is_plain(part, GateUpLinear):
            return self.act_fn(norm_linear(norm, part, GateUpLinear, x))
        weights = part.matrix.stored, part.bias
        options = {"activation": activation, "batch_invariant": part.batch_invariant}
        if norm is None:
            return ops.gated_linear(x, *weights, **options)
        if not is_plain(norm, RMSNorm):
            return ops.gated_linear(norm(x), *weights, **options)
        return ops.norm_gated_linear(
            x, norm.weight, norm.eps, *weights, weight_offset=norm.weight_offset, **options
        )


class PlainMLP(nn.Module):
    """`c_proj(act(c_fc(x)))`, its parts named as in GPT-2.

    Args:
        hidden_size: width of input and output.
        intermediate_size: width between the two layers.
        hidden_act: name of the activation, as in Hugging Face's configs.
        bias: whether the two layers have biases.
        quant_config, prefix: as for `Linear`.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        hidden_act: str,
        bias: bool = True,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ):
        super().__init__()
        self.c_fc = Linear(
            hidden_size, intermediate_size, bias, quant_config, add_prefix("c_fc", prefix)
        )
        self.act_and_mul = gated_activation(hidden_act)
        self.c_proj = Linear(
            intermediate_size, hidden_size, bias, quant_config, add_prefix("c_proj", prefix)
        )

    def forward(self, x: Tensor) -> Tensor:
        """[T, hidden_size] -> [T, hidden_size]."""
        x = self.c_fc(x)
        # A gate on ones: torch's own activations round an element by its place in the whole
        # tensor, on the CPU, and so by what else is in the batch.
        return self.c_proj(self.act_and_mul(torch.cat([x, torch.ones_like(x)], dim=-1)))


def op_name(act_fn: nn.Module) -> str | None:
    """What the fused ops call a plain activation; None for another module."""
    if is_plain(act_fn, SiluAndMul):
        return "silu"
    if is_plain(act_fn, GeluAndMul):
        return "gelu_tanh" if act_fn.approximate == "tanh" else "gelu"
    return None
