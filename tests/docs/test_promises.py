"""Each promise of docs/promises.md names tests, and those exist."""

import ast
import re

from tests.children import ROOT

PAGE = (ROOT / "docs" / "promises.md").read_text(encoding="utf-8")


def promises():
    """The rows of the tables: what is promised, and by which tests it is kept."""
    kept = PAGE.partition("## Long runs")[0].splitlines()
    rows = [line.strip("|").split(" | ") for line in kept if line.startswith("| ")]
    rows = [row for row in rows if row[0].strip() != "promise"]
    return [(promise, re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", kept)) for promise, kept in rows]


def names_in(path):
    """Tests of a file, those in classes too, and what it assigns."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    names = {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    assigned = [target for n in tree.body if isinstance(n, ast.Assign) for target in n.targets]
    return names | {target.id for target in assigned if isinstance(target, ast.Name)}


def test_every_promise_names_tests_that_exist():
    found = promises()
    assert len(found) > 35
    for promise, tests in found:
        assert tests, f"nothing keeps: {promise}"
        for path, name in tests:
            assert name.lower().startswith("test")
            assert name in names_in(path), f"{path} has no {name}"


def test_the_readme_leads_here():
    assert "docs/promises.md" in (ROOT / "README.md").read_text(encoding="utf-8")
