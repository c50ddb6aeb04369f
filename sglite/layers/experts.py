"""MLPs of many experts, of which each token uses a few."""

import torch
from torch import Tensor, nn

from sglite import ops
from sglite.layers.composite import is_plain
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
        if self._experts_are_plain():
            parts = [
                (e.gate_up_proj.matrix.stored, e.down_proj.matrix.stored) for e in self.experts
            ]
            gate_up, down = zip(*parts, strict=True)
            out = ops.mix_experts(
                x,
                weights,
                chosen,
                gate_up,
                down,
                activation=op_name(self.experts[0].act_fn),
                batch_invariant=self.gate.batch_invariant,
            )
        else:
            out = self._mix_modules(x, weights, chosen)
        if self.shared_expert is None:
            return out
        # sigmoid(a) = (1 + tanh(a / 2)) / 2, by the one tanh whose bits do not depend on the batch.
        share = (ops.soft_cap(self.shared_expert_gate(x) / 2, 1.0) + 1) / 2
        return out + (share * self.shared_expert(x).float()).to(x.dtype)

    def _experts_are_plain(self) -> bool:
        """Whether one op may do the work of all experts, which have no biases."""
        activation = op_name(self.experts[0].act_fn)
        return activation is not None and all(
            is_plain(expert, GatedMLP)
            and is_plain(expert.gate_up_proj, GateUpLinear)
            and is_plain(expert.down_proj, Linear)
            and op_name(expert.act_fn) == activation
            for expert in self.experts
        )

    def _mix_modules(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """As `sglite.ops.mix_experts`, the experts run as modules."""
        total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        factors = weights.flatten()
        for expert, rows, places in ops.rows_of_experts(chosen, len(self.experts)):
            out = self.experts[expert](x[rows])
            total.index_add_(0, rows, out.float() * factors[places, None])
        return total.to(x.dtype)
