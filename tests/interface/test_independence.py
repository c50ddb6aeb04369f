"""The lowest floor reads only the standard library and itself, so it is quick to import."""

import ast
import sys
from pathlib import Path

import pytest

import sglite.interface

FILES = sorted(Path(sglite.interface.__file__).parent.glob("*.py"))


def imports_at_run_time(tree):
    """Yield the names of modules that a file imports, those for type checkers left out."""
    for node in tree.body:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        for inner in ast.walk(node):
            if isinstance(inner, ast.Import):
                yield from (alias.name for alias in inner.names)
            elif isinstance(inner, ast.ImportFrom):
                assert inner.level == 0
                yield inner.module


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_imports_only_the_standard_library_and_itself(path):
    for module in imports_at_run_time(ast.parse(path.read_text())):
        standard = module.partition(".")[0] in sys.stdlib_module_names
        assert standard or module.startswith("sglite.interface"), module


def test_every_public_name_is_handed_on():
    for name in sglite.interface.__all__:
        assert hasattr(sglite.interface, name)
    assert sglite.interface.__all__ == sorted(sglite.interface.__all__)
