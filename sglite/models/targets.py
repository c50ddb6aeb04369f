"""Where the tensors of a checkpoint go in a model, by their names; see `sglite.models.weights`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sglite.layers.linear import StackedLinear
from sglite.layers.weight import Weight, WeightModule
from sglite.ops import WeightWriter


@dataclass(frozen=True)
class Target:
    """Where a checkpoint's tensor goes: a whole tensor, or rows of one.

    Attributes:
        tensor: a packed weight, or a parameter or buffer.
        start: the first row.
        shape: what the checkpoint's tensor must have.
    """

    tensor: Weight | Tensor
    start: int
    shape: tuple[int, ...]

    @property
    def key(self) -> tuple[int, int]:
        """Equal for two names of the same place, as of a tied embedding and head."""
        return id(self.tensor), self.start

    @property
    def dtype(self) -> torch.dtype:
        """What is stored."""
        return self.tensor.dtype

    def write(self, value: Tensor) -> None:
        """Fills the place."""
        if isinstance(self.tensor, Weight):
            self.tensor.write_rows(self.start, value.flatten(1))
        else:
            self._place().copy_(value)

    def add_to(self, writer: WeightWriter, value: Tensor, *, is_mapped: bool) -> bool:
        """Has `writer` fill the place when it runs; False where it cannot."""
        return isinstance(self.tensor, Weight) and self.tensor.add_rows(
            writer, self.start, value.flatten(1), is_mapped=is_mapped
        )

    def _place(self) -> Tensor:
        whole = self.tensor.detach()
        return whole[self.start : self.start + self.shape[0]] if self.shape else whole


def targets_of(model: nn.Module) -> dict[str, Target]:
    """What a checkpoint of this model holds: the tensors' names, and where each goes."""
    stacked: Mapping[str, Sequence[str]] = getattr(model, "stacked_params", {})
    targets: dict[str, Target] = {}
    plain = model.state_dict(keep_vars=True)
    for path, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, WeightModule):
            continue
        parent, _, own_name = path.rpartition(".")
        is_stacked = isinstance(module, StackedLinear)
        own_parts = stacked.get(own_name, ())
        if own_parts and (is_stacked or len(own_parts) == 1):
            names = [f"{parent}.{part}" if parent else part for part in own_parts]
            whole = [(0, module.matrix.shape[0])]
            ranges = list(module.segments.values()) if is_stacked else whole
            if len(names) != len(ranges):
                raise ValueError(
                    f"stacked_params[{own_name!r}] names {len(names)} parts; {path} has "
                    f"{list(module.segments) if is_stacked else [own_name]}"
                )
            bias = plain.pop(f"{path}.bias", None)
        else:
            names, ranges = [path], [(0, module.matrix.shape[0])]
            bias = None
        # A convolution over patches is a linear layer here.
        rest = getattr(module, "checkpoint_shape", module.matrix.shape)[1:]
        for name, (start, stop) in zip(names, ranges, strict=True):
            targets[f"{name}.weight"] = Target(module.matrix, start, (stop - start, *rest))
            if bias is not None:
                targets[f"{name}.bias"] = Target(bias, start, (stop - start,))
    for name, tensor in plain.items():
        targets[name] = Target(tensor, 0, tuple(tensor.shape))
    return targets
