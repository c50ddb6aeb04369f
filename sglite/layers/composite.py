"""How composites run their parts.

A composite may do a part's work together with its own (add the residual inside the part's last
linear layer, say) only while that part is exactly the library's own type and nobody listens to it:
a subclass, a hook or a replaced `forward` must see the part's own input and output. Both ways give
the same bits.
"""

from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks


def is_plain(part: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling `part` does what `kind.forward` does, and nothing else."""
    return (
        type(part) is kind
        and not part._forward_hooks
        and not part._forward_pre_hooks
        and "forward" not in part.__dict__
        and not _global_forward_hooks
        and not _global_forward_pre_hooks
    )


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
