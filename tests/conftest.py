"""Fixtures that every test may use."""

import pytest

from tests.builds import use_chosen_build

use_chosen_build()

from sglite import _C, ModelRegistry  # noqa: E402


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
def two_threads():
    """Two kernel threads, for what is shown elsewhere not to depend on how many there are."""
    _C.set_num_threads(2)
    yield
    _C.set_num_threads(0)


@pytest.fixture
def registry_as_before(monkeypatch):
    """Takes back what a test registers."""
    models = ModelRegistry.models
    monkeypatch.setattr(models, "_classes", dict(models._classes))
    monkeypatch.setattr(models, "_set", set(models._set))
