"""Fixtures that every test may use."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch  # noqa: F401  (before the extension, which resolves OpenMP through it)

if os.environ.get("SGLITE_EMULATED"):  # the build that runs CUDA kernels on the CPU
    (path,) = (Path(__file__).parents[1] / "build/emulated/sglite").glob("_C.*.so")
    spec = importlib.util.spec_from_file_location("sglite._C", path)
    sys.modules["sglite._C"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["sglite._C"])

from sglite import _C, ModelRegistry


@pytest.fixture(params=_C.available_cpu_paths())
def cpu_path(request):
    """Runs the test once on each CPU path that this processor has."""
    before = _C.cpu_path()
    _C.select_cpu_path(request.param)
    yield request.param
    _C.select_cpu_path(before)


@pytest.fixture(params=[1, 2])
def num_threads(request):
    """Runs the test with one and with two kernel threads."""
    _C.set_num_threads(request.param)
    yield request.param
    _C.set_num_threads(0)


@pytest.fixture
def registry_as_before(monkeypatch):
    """Takes back what a test registers."""
    models = ModelRegistry.models
    monkeypatch.setattr(models, "_classes", dict(models._classes))
    monkeypatch.setattr(models, "_set", set(models._set))
