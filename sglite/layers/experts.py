"""MLPs of many experts, of which each token uses a few."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from sglite import ops
from sglite.layers.composite import are_plain, is_plain
from sglite.layers.linear import GateUpLinear, Linear
from sglite.layers.mlp import GatedMLP, op_name
from sglite.layers.porting import QuantizationConfig, add_prefix


class Router(Linear):
    """The linear layer from hidden states to one logit per expert, which stay float32.

    Args:
        hidden_size: width of the input.
        num_experts: width of the output.
        quant_config, prefix: as for `Linear`.
    """

    # Where two experts' logits are close, rounding changes which of them a token goes to; and it
    # would save next to nothing.
    quantized_at_load: ClassVar[bool] = False

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ):
        super().__init__(hidden_size, num_experts, False, quant_config, prefix)

    def forward(self, x: Tensor) -> Tensor:
        """[T, hidden_size] -> [T, num_experts] float32."""
        return ops.linear(
            x,
            self.matrix.stored,
            out_dtype=torch.float32,
            batch_invariant=self.batch_invariant,
        )


class SparseMLP(nn.Module):
    """`sum over the top_k experts e of p_e * expert_e(x)`, `p = softmax(gate(x))`.

    With a shared expert, `+ sigmoid(shared_expert_gate(x)) * shared_expert(x)` (Qwen2-MoE).

    Args:
        hidden_size: width of input and output.
        intermediate_size: width of an expert.
        num_experts: how many there are.
        top_k: how many of them a token uses.
        normalize: whether the p of these are divided by their sum.
        hidden_act: name of the activation, as in Hugging Face's configs.
        shared_size: width of the shared expert; None: there is none.
        quant_config, prefix: as for `Linear`.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        top_k: int,
        *,
        normalize: bool,
        hidden_act: str = "silu",
        shared_size: int | None = None,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ):
        super().__init__()
        if not 1 <= top_k <= num_experts:
            raise ValueError(
                f"{prefix or 'SparseMLP'}: a token cannot use {top_k} of {num_experts} experts"
            )
        self.top_k = top_k
        self.normalize = normalize
        self.gate = Router(hidden_size, num_experts, quant_config, add_prefix("gate", prefix))

        def make(width: int, name: str) -> GatedMLP:
            return GatedMLP(
                hidden_size,
                width,
                hidden_act,
                quant_config=quant_config,
                prefix=add_prefix(name, prefix),
            )

        self.experts = nn.ModuleList(
            make(intermediate_size, f"experts.{i}") for i in range(num_experts)
        )
        self.shared_expert = self.shared_expert_gate = None
        if shared_size is not None:
            self.shared_expert = make(shared_size, "shared_expert")
            self.shared_expert_gate = Router(
                hidden_size, 1, quant_config, add_prefix("shared_expert_gate", prefix)
            )

    def forward(self, x: Tensor) -> Tensor:
        """[T, hidden_size] -> [T, hidden_size]."""
        weights, chosen = ops.route(self.gate(x), self.top_k, normalize=self.normalize)
        experts = list(self.experts)
        activation = self._common_activation(experts, chosen)
        if activation is not None:
            out = ops.mix_experts(
                x,
                weights,
                chosen,
                _Stored(experts, "gate_up_proj"),
                _Stored(experts, "down_proj"),
                activation=activation,
                batch_invariant=self.gate.batch_invariant,
            )
        else:
            out = self._mix_modules(x, weights, chosen)
        if self.shared_expert is None:
            return out
        # sigmoid(a) = (1 + tanh(a / 2)) / 2, by the one tanh whose bits do not depend on the batch.
        share = (ops.soft_cap(self.shared_expert_gate(x) / 2, 1.0) + 1) / 2
        return out + (share * self.shared_expert(x).float()).to(x.dtype)

    @staticmethod
    def _common_activation(experts: list[nn.Module], chosen: Tensor) -> str | None:
        """The activation of the chosen experts if one op may do their work; they have no biases."""
        found = None
        # Of many experts a few tokens use few. On a GPU it would take a wait to know which.
        numbers = range(len(experts)) if chosen.is_cuda else ops.used_experts(chosen, len(experts))
        for number in numbers:
            expert = experts[number]
            if not is_plain(expert, GatedMLP):
                return None
            parts = expert._modules
            activation = op_name(parts["act_fn"])
            linears = ((parts["gate_up_proj"], GateUpLinear), (parts["down_proj"], Linear))
            if activation is None or activation != (found or activation) or not are_plain(linears):
                return None
            found = activation
        return found

    def _mix_modules(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """As `sglite.ops.mix_experts`, the experts run as modules."""
        total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        factors = weights.flatten()
        for expert, rows, places in ops.rows_of_experts(chosen, len(self.experts)):
            out = self.experts[expert](x[rows])
            total.index_add_(0, rows, out.float() * factors[places, None])
        return total.to(x.dtype)


class _Stored(Sequence):
    """One weight of each expert as the ops take it, looked up when it is asked for.

    Args:
        experts: the experts.
        name: of the linear layer that has the weight.
    """

    def __init__(self, experts: list[nn.Module], name: str):
        self._experts = experts
        self._name = name

    def __len__(self) -> int:
        return len(self._experts)

    def __getitem__(self, expert: int):
        return self._experts[expert]._modules[self._name].matrix.stored
