"""A tree of one's own over the parameters of a live module.

The tree has the module's structure and its very parameters; what it keeps besides (dicts, lists,
buffers, configs) are copies, so that neither running the tree nor replacing its parts is seen by
the module.
"""

import copy
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig

from sglite.interface.errors import UnsupportedModelError


def share_module(module: nn.Module) -> nn.Module:
    """A tree like `module`, in evaluation mode, with the same parameters.

    Hooks of the module run in the tree, too.

    Raises:
        UnsupportedModelError: a part's `forward` was replaced on the instance, or a parameter has
            no memory (it is on the meta device).
    """
    for path, part in module.named_modules():
        if "forward" in part.__dict__:
            raise UnsupportedModelError(
                f"{path or 'the module'} ({type(part).__name__}) has a forward of its own, set on "
                f"the instance (as accelerate's hooks do): it cannot be run beside the module"
            )
    for name, parameter in module.named_parameters():
        if parameter.is_meta:
            raise UnsupportedModelError(
                f"{name} is on the meta device: give the module its weights first"
            )
    configs: dict[int, Any] = {}
    return _clone(module, {}, configs).eval()


def _clone(module: nn.Module, done: dict[int, nn.Module], configs: dict[int, Any]) -> nn.Module:
    found = done.get(id(module))
    if found is not None:
        return found
    clone = done[id(module)] = type(module).__new__(type(module))
    for name, value in module.__dict__.items():
        clone.__dict__[name] = _copy(value, done, configs)
    clone.__dict__["_modules"] = {
        name: child if child is None else _clone(child, done, configs)
        for name, child in module._modules.items()
    }
    clone.__dict__["_buffers"] = {
        name: buffer if buffer is None else buffer.detach().clone()
        for name, buffer in module._buffers.items()
    }
    return clone


def _copy(value: Any, done: dict[int, nn.Module], configs: dict[int, Any]) -> Any:
    if isinstance(value, PreTrainedConfig):
        return copy.deepcopy(value, configs)
    if isinstance(value, nn.Module):
        return _clone(value, done, configs)
    if isinstance(value, Tensor):
        return value
    # Shallow: parameters and hooks are to be the same objects.
    return copy.copy(value) if isinstance(value, dict | list | set) else value
