"""Model classes that other packages bring, found without a line of Python.

Two ways: the environment variable `SGLITE_EXTERNAL_MODEL_PACKAGE` names a package, whose modules
are scanned for `EntryClass` (one class or a list of them, as in SGLang); or a package that is
installed declares an entry point in the group `sglite.models`, for such a module or a class.
A class serves the architecture of its own name.
"""

import importlib
import os
import threading
import traceback
import warnings
from collections.abc import Iterable, Mapping
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType
from typing import Any

from torch import nn

from sglite.interface.packages import scan_package

#: Names the package to scan.
PACKAGE_VARIABLE = "SGLITE_EXTERNAL_MODEL_PACKAGE"
#: The group of entry points.
ENTRY_POINT_GROUP = "sglite.models"


class ExternalModels:
    """The classes of the package that the environment names, and of entry points.

    Looked for at the first look-up, and again when the variable has changed. Whatever is broken is
    left out, and kept as a problem.
    """

    def __init__(self):
        self._lock = threading.RLock()
        self._package = ""
        self._looked = False
        self._classes: dict[str, type[nn.Module]] = {}
        self._problems: list[str] = []
        self._told: set[str] = set()

    def classes(self) -> Mapping[str, type[nn.Module]]:
        """Per architecture its class; the variable's package goes before entry points."""
        with self._lock:
            package = os.environ.get(PACKAGE_VARIABLE, "").strip()
            if not self._looked or package != self._package:
                # First, since modules that are imported may look up a class themselves.
                self._package, self._looked = package, True
                self._look()
            return self._classes

    def retry(self) -> None:
        """Looks again at the next look-up if something was broken: it may have been mended."""
        with self._lock:
            self._looked = self._looked and not self._problems

    def problems(self) -> list[str]:
        """What is broken: per module or entry point its name, and why."""
        with self._lock:
            self.classes()
            return list(self._problems)

    def warn(self) -> None:
        """Warns of what is broken, of each problem once."""
        for problem in self.problems():
            if problem not in self._told:
                self._told.add(problem)
                warnings.warn(f"{problem}\nIts models are not there.", stacklevel=2)

    def _look(self) -> None:
        declared, named = _Findings(), _Findings()
        for entry_point in entry_points(group=ENTRY_POINT_GROUP):
            declared.take_entry_point(entry_point)
        if self._package:
            named.take_package(self._package, f"{PACKAGE_VARIABLE}={self._package}")
        self._classes = {**declared.classes, **named.classes}
        self._problems = list(dict.fromkeys([*named.problems, *declared.problems]))


class _Findings:
    """Classes found so far, and problems met."""

    def __init__(self):
        self.classes: dict[str, type[nn.Module]] = {}
        self.problems: list[str] = []
        self._homes: dict[str, str] = {}

    def take_entry_point(self, entry_point: EntryPoint) -> None:
        """Takes the class or classes it names, or scans the module."""
        origin = f"entry point {entry_point.name} = {entry_point.value!r}"
        if not entry_point.attr:
            self.take_package(entry_point.module, origin)
            return
        module = self._import(entry_point.module, origin)
        if module is None:
            return
        try:
            found = entry_point.load()
        except AttributeError as error:
            self.problems.append(f"{origin}: {error}")
            return
        self._take(found, entry_point.module, origin)

    def take_package(self, name: str, origin: str) -> None:
        """Scans a package and all modules in it, or a module that stands alone."""

        def import_module(found: str) -> ModuleType | None:
            return self._import(found, origin if found == name else "")

        # All are imported before any is looked at, as one may add to what another has.
        for module in list(scan_package(name, import_module)):
            if "EntryClass" in vars(module):
                self._take(module.EntryClass, module.__name__, "EntryClass")

    def _import(self, name: str, origin: str) -> ModuleType | None:
        try:
            return importlib.import_module(name)
        except (Exception, SystemExit) as error:  # whatever a module of someone else's raises
            prefix = f"{origin}: " if origin else ""
            if isinstance(error, ModuleNotFoundError) and _is_or_lies_in(name, error.name):
                reason = (
                    f"there is no module {error.name!r}: install it, or put the folder that it "
                    f"lies in on PYTHONPATH"
                )
            else:
                reason = f"the module {name!r} cannot be imported: {_reason(error)}"
            self.problems.append(prefix + reason)
            return None

    def _take(self, found: Any, home: str, what: str) -> None:
        for model_class in found if isinstance(found, list | tuple) else [found]:
            if not (isinstance(model_class, type) and issubclass(model_class, nn.Module)):
                self.problems.append(
                    f"the module {home!r}: {what} must be a class that derives from "
                    f"torch.nn.Module, or a list of them, got {model_class!r}"
                )
                continue
            name = model_class.__name__
            if self.classes.setdefault(name, model_class) is not model_class:
                self.problems.append(
                    f"the module {home!r}: {what} names a class {name}, and so does the module "
                    f"{self._homes[name]!r}, whose class is used"
                )
            self._homes.setdefault(name, home)


def _reason(error: BaseException) -> str:
    """The error in a line, with the place in the code of the module where it was raised."""
    text = "".join(traceback.format_exception_only(error)).strip().splitlines()[-1]
    if isinstance(error, SyntaxError):
        return f"{text} ({error.filename}, line {error.lineno})"
    own = _without_machinery(traceback.extract_tb(error.__traceback__))
    return f"{text} ({own[-1].filename}, line {own[-1].lineno})" if own else text


def _is_or_lies_in(name: str, package: str | None) -> bool:
    return package is not None and f"{name}.".startswith(f"{package}.")


def _without_machinery(frames: Iterable[traceback.FrameSummary]) -> list[traceback.FrameSummary]:
    """The frames of code, less this file's and those of the import system."""
    machinery = (__file__, importlib.__file__)
    return [
        frame
        for frame in frames
        if frame.filename not in machinery and not frame.filename.startswith("<frozen")
    ]
