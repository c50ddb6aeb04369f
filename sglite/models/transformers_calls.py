"""How the parts of a model are called, seen in one forward."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class CallRecord:
    """The calls of one module.

    Attributes:
        order: the number of the module's first call among all modules' calls.
        count: how often it was called.
        is_simple: whether each call had one tensor as its only argument.
        input_key: the same for modules whose (last) argument was the same tensor.
        inputs: a copy of that argument, to see whether it was changed in between.
    """

    order: int
    count: int = 0
    is_simple: bool = True
    input_key: int | None = None
    inputs: Tensor | None = field(default=None, repr=False)


@contextmanager
def record_calls(model: nn.Module) -> Iterator[dict[str, CallRecord]]:
    """Listens to the calls of every module of a model within a `with` block.

    Gives a dict, from module path to `CallRecord`, that fills up meanwhile. The paths are the first
    ones of modules that are reached by several.
    """
    records: dict[str, CallRecord] = {}
    kept: list[Tensor] = []  # so that no two tensors have one id
    handles = []

    def listener(path: str):
        def listen(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            record = records.setdefault(path, CallRecord(order=len(records)))
            record.count += 1
            given = [*args, *kwargs.values()]
            tensor = given[0] if len(given) == 1 else None
            if not isinstance(tensor, Tensor) or not args:
                record.is_simple = False
                return
            kept.append(tensor)
            record.input_key = id(tensor)
            if isinstance(module, nn.Linear):
                record.inputs = tensor.detach().clone()

        return listen

    try:
        for path, module in model.named_modules():
            if path:
                handles.append(module.register_forward_pre_hook(listener(path), with_kwargs=True))
        with torch.inference_mode():
            yield records
    finally:
        for handle in handles:
            handle.remove()
