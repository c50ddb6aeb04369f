"""Whether what was made of modules would be made anew in the same way."""

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any, NamedTuple

from torch import nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

from sglite import _C

_ABSENT = object()


class Place(NamedTuple):
    """Where something is found: `table[key]`."""

    table: dict[str, Any]
    key: str


class Snapshot:
    """What lay where when it was taken, and that some modules ran their class's `forward` alone.

    Parts, weights and numbers may be replaced, and hooks added, at any time; nobody tells. So all
    is compared in every step, in one call.

    Args:
        places: where something lies, or nothing.
        modules: nobody listens to them, and none has a `forward` of its own.
    """

    def __init__(self, places: Iterable[Place], modules: Sequence[nn.Module]):
        places = [*places, *(Place(vars(module), "forward") for module in modules)]
        self._tables = tuple(table for table, _ in places)
        self._keys = tuple(key for _, key in places)
        self._values = tuple(table.get(key, _ABSENT) for table, key in places)
        self._modules = tuple(modules)
        self._kinds = tuple(map(type, modules))
        hooks = ((module._forward_hooks, module._forward_pre_hooks) for module in modules)
        self._hooks = (_global_forward_hooks, _global_forward_pre_hooks, *chain(*hooks))

    @classmethod
    def of_all(cls, snapshots: Sequence["Snapshot"]) -> "Snapshot":
        """One that holds while all of these do."""
        joined = cls((), ())
        for name in vars(joined):
            setattr(joined, name, tuple(chain(*(getattr(each, name) for each in snapshots))))
        return joined

    def holds(self) -> bool:
        """Whether all is as it was."""
        return _C.is_unchanged(
            self._tables,
            self._keys,
            self._values,
            _ABSENT,
            self._modules,
            self._kinds,
            self._hooks,
        )
