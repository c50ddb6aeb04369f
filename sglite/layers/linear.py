"""Linear layers, alone and stacked."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sglite import ops
from sglite.layers.porting import QuantizationConfig, refuse_quantization
from sglite.layers.weight import WeightModule


class Linear(WeightModule):
    """`y = x W^T + b`, and `+ residual` where one is given.

    Args:
        in_features: width of `x`.
        out_features: width of `y`.
        bias: whether there is a bias, [out_features].
        quant_config: must be None.
        prefix: module path, for messages.

    Attributes:
        batch_invariant: on a GPU, one arithmetic for every number of rows; set by the engine.
    """

    batch_invariant: bool = False

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ):
        super().__init__(out_features, in_features, prefix)
        refuse_quantization(quant_config, prefix)
        self.in_features = in_features
        self.out_features = out_features
        self.bias = nn.Parameter(torch.zeros(out_features), requires_grad=False) if bias else None

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """[..., in_features] -> [..., out_features], in the dtype of `x`.

        The residual, shaped like the result, is added to the rounded product and the sum rounded
        again: the same bits as an addition behind the layer.
        """
        return ops.linear(
            x,
            self.matrix.stored,
            self.bias,
            residual=residual,
            batch_invariant=self.batch_invariant,
        )

    def extra_repr(self) -> str:
        """The part of the module's repr in brackets."""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


class StackedLinear(Linear):
    """Several linear layers of one input as one: their weights follow one another.

    Checkpoints hold the parts under names of their own; the model's `stacked_params` says which.

    Args:
        in_features: width of the input.
        segments: the parts' names and widths of output, in the order of the output's columns.
        bias, quant_config, prefix: as for `Linear`.

    Attributes:
        segments: per part the rows of the weight, (start, stop).
    """

    def __init__(
        self,
        in_features: int,
        segments: Mapping[str, int],
        bias: bool = True,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ):
        super().__init__(in_features, sum(segments.values()), bias, quant_config, prefix)
        self.segments: dict[str, tuple[int, int]] = {}
        start = 0
        for name, width in segments.items():
            self.segments[name] = (start, start + width)
            start += width

    def segment_weight(self, name: str) -> Tensor:
        """A copy of one part's weight, [its width, in_features]."""
        return self.matrix.read_rows(*self.segments[name])

    def segment_bias(self, name: str) -> Tensor | None:
        """A view of one part's bias, [its width]."""
        return None if self.bias is None else self.bias[slice(*self.segments[name])]


class QKVLinear(StackedLinear):
    """The projections to query, key and value as one; parts "q", "k" and "v".

    Args:
        hidden_size: width of the input.
        head_dim: channels of a head.
        num_heads: query heads.
        num_kv_heads: key and value heads; as many as query heads when None.
        bias, quant_config, prefix: as for `Linear`.
    """

    def __init__(
        self,
        hidden_size: int,
        head_dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        bias: bool = True,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ):
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_kv_heads < 1 or num_heads % num_kv_heads:
            raise ValueError(
                f"{prefix or 'QKVLinear'}: {num_heads} query heads cannot share {num_kv_heads} "
                f"key/value heads evenly"
            )
        kv_width = num_kv_heads * head_dim
        super().__init__(
            hidden_size,
            {"q": num_heads * head_dim, "k": kv_width, "v": kv_width},
            bias,
            quant_config,
            prefix,
        )


class GateUpLinear(StackedLinear):
    """The two projections in front of a gated activation as one; parts "gate" and "up"."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        bias: bool = True,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ):
        super().__init__(
            hidden_size,
            {"gate": intermediate_size, "up": intermediate_size},
            bias,
            quant_config,
            prefix,
        )
