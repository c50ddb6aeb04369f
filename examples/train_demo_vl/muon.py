"""Muon for many small matrices: those of one shape are orthogonalised together."""

from collections.abc import Iterable

import torch

# Coefficients of the quintic iteration (Jordan et al., 2024).
_A, _B, _C = 3.4445, -4.7750, 2.0315
_STEPS = 5


class Muon(torch.optim.Optimizer):
    """What `torch.optim.Muon(adjust_lr_fn="match_rms_adamw")` does, in a tenth of the kernels.

        m = momentum * m + (1 - momentum) * g
        w = (1 - lr * decay) * w - lr * 0.2 * sqrt(max(w.shape)) * orthogonal(nesterov(m, g))

    Args:
        params: matrices, all of which get a gradient in each step.
        lr: the learning rate.
        momentum: of the running mean of gradients.
        weight_decay: as a share of the learning rate.
    """

    def __init__(
        self,
        params: Iterable[torch.Tensor],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
    ):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        """One step; the gradients must be there."""
        for settings in self.param_groups:
            by_shape: dict[torch.Size, list[torch.Tensor]] = {}
            for parameter in settings["params"]:
                by_shape.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in by_shape.items():
                gradients = torch.stack([parameter.grad for parameter in parameters])
                state = self.state[parameters[0]]
                if not state:
                    state["mean"] = torch.zeros_like(gradients)
                mean = state["mean"].lerp_(gradients, 1 - settings["momentum"])
                updates = orthogonal(gradients.lerp_(mean, settings["momentum"]))
                rate = settings["lr"]
                torch._foreach_mul_(parameters, 1 - rate * settings["weight_decay"])
                updates = updates.to(gradients.dtype).unbind()
                torch._foreach_add_(parameters, updates, alpha=-rate * 0.2 * max(shape) ** 0.5)


def orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """The nearest matrices whose singular values are about 1, [n, rows, columns], by Newton-Schulz.

    In bfloat16 on a GPU, which is exact enough for a direction.
    """
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    return x.mT if tall else x
