"""Checkpoints to load and to break."""

import shutil
from pathlib import Path

import pytest

from sglite import ModelRegistry
from tests.checkpoints import make_checkpoint


@pytest.fixture(scope="session")
def sound(tmp_path_factory):
    """A small Llama; not to be changed."""
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"), "llama")


@pytest.fixture
def folder(sound, tmp_path):
    """A copy of it that a test may break."""
    return Path(shutil.copytree(sound, tmp_path / "model"))


@pytest.fixture
def architecture():
    """A name to register a class under, for one test."""
    yield "Registered"
    ModelRegistry.models.pop("Registered", None)
