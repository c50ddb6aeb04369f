"""Packages of others that the environment names: all their modules, imported one by one."""

import pkgutil
from collections.abc import Callable, Iterator
from types import ModuleType


def scan_package(
    name: str, import_module: Callable[[str], ModuleType | None]
) -> Iterator[ModuleType]:
    """Imports a package and all modules in it, or a module that stands alone.

    Args:
        name: of the package or module, with dots.
        import_module: imports by name; where it gives None, there is nothing, and nothing within.
    """
    module = import_module(name)
    if module is None:
        return
    yield module
    for found in pkgutil.iter_modules(getattr(module, "__path__", ()), f"{name}."):
        if not found.name.endswith(".__main__"):  # would run, not define
            yield from scan_package(found.name, import_module)
