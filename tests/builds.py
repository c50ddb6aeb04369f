"""Runs the tests on another build of the extension than the one beside the package."""

import importlib.util
import os
import sys
from pathlib import Path

import torch  # noqa: F401  (before the extension, which resolves OpenMP through it)


def use_chosen_build() -> None:
    """Loads the build that SGLITE_BUILD names, a folder below `build`, before sglite is imported.

    "emulated" runs CUDA kernels on the CPU, "asan" holds the address and undefined-behaviour
    sanitizers; the Makefile makes them.
    """
    name = os.environ.get("SGLITE_BUILD")
    if name and "sglite._C" not in sys.modules:
        (path,) = (Path(__file__).parents[1] / "build" / name / "sglite").glob("_C.*.so")
        spec = importlib.util.spec_from_file_location("sglite._C", path)
        sys.modules["sglite._C"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["sglite._C"])
