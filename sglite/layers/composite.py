"""How composites run their parts.

A composite may do a part's work together with its own (add the residual inside the part's last
linear layer, say) only while that part is exactly the library's own type and nobody listens to it:
a subclass, a hook or a replaced `forward` must see the part's own input and output. Both ways give
the same bits.
"""

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

from sglite import ops
from sglite.layers.linear import Linear
from sglite.layers.norm import RMSNorm


def is_plain(part: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling `part` does what `kind.forward` does, and nothing else."""
    return type(part) is kind and runs_only(part, kind.forward)


def runs_only(part: nn.Module, forward: Callable) -> bool:
    """Whether calling `part` runs this function of its class, and nothing else."""
    return (
        type(part).forward is forward
        and not part._forward_hooks
        and not part._forward_pre_hooks
        and "forward" not in part.__dict__
        and not _global_forward_hooks
        and not _global_forward_pre_hooks
    )


def are_plain(parts: Iterable[tuple[nn.Module, type[nn.Module]]]) -> bool:
    """Whether `is_plain` holds for every pair of a part and its kind."""
    return all(is_plain(part, kind) for part, kind in parts)


def add_part(part: nn.Module, kind: type[nn.Module], residual: Tensor, *inputs: Any) -> Tensor:
    """`residual + part(*inputs)`, added inside the part where it is plain.

    Args:
        part: the module to run.
        kind: the type whose `forward` takes `residual`.
        residual: shaped like the part's output.
        *inputs: the part's other arguments.
    """
    if is_plain(part, kind):
        return part.forward(*inputs, residual=residual)
    return residual + part(*inputs)


def norm_linear(norm: nn.Module | None, part: nn.Module, kind: type[Linear], x: Tensor) -> Tensor:
    """`part(norm(x))`, as one op where both are plain.

    Args:
        norm: what comes first; None: nothing does.
        part: the linear layer.
        kind: the type that it has where it is plain.
        x: [T, in_features].
    """
    if norm is None:
        return part(x)
    if not (is_plain(norm, RMSNorm) and is_plain(part, kind)):
        return part(norm(x))
    return ops.norm_linear(
        x,
        norm.weight,
        norm.eps,
        part.matrix.stored,
        part.bias,
        weight_offset=norm.weight_offset,
        batch_invariant=part.batch_invariant,
    )
