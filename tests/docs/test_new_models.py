"""Every block of docs/new_models.md is run, in order, as somebody who follows it would."""

import os
import re
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

import pytest

_BLOCK = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
_SAVED = re.compile(r"# (\S+/\S+\.py)\n")


def blocks(page):
    """(line, language, code) of every block."""
    text = page.read_text(encoding="utf-8")
    return [
        (text.count("\n", 0, found.start()) + 2, found[2], textwrap.dedent(found[3]))
        for found in _BLOCK.finditer(text)
    ]


def run_python(code, line, page, namespace):
    """Runs a block; one that begins with a path is saved there as well."""
    saved = _SAVED.match(code)
    if saved:
        path = Path(saved[1])
        path.parent.mkdir(exist_ok=True)
        path.write_text(code)
    exec(compile("\n" * (line - 1) + code, str(page), "exec"), namespace)


def without_figures(text):
    return re.sub(r"error [\d.e-]+", "error", text)


def run_shell(code, root):
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    subprocess.run(
        ["bash", "-euo", "pipefail", "-c", code],
        check=True,
        timeout=300,
        env={**os.environ, "PATH": path, "PYTHONPATH": str(root)},
    )


@pytest.fixture
def configs(monkeypatch):
    """Takes back what the page adds to the suite."""
    from tests import checkpoints

    monkeypatch.setattr(checkpoints, "CONFIGS", dict(checkpoints.CONFIGS))
    return checkpoints.CONFIGS


def test_all_blocks_run(pytestconfig, tmp_path, monkeypatch, registry_as_before, configs, capsys):
    page = pytestconfig.rootpath / "docs" / "new_models.md"
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "new_models"}
    count = 0
    for line, language, code in blocks(page):
        if language == "python":
            run_python(code, line, page, namespace)
        elif language == "sh":
            run_shell(code, pytestconfig.rootpath)
        elif language == "toml":
            package = pytestconfig.rootpath / "examples" / "external_package" / "pyproject.toml"
            shown = tomllib.loads(code)["project"]
            project = tomllib.loads(package.read_text())["project"]
            assert {name: project[name] for name in shown} == shown
        elif language == "text":  # what the block in front of it prints
            assert without_figures(code.strip()) == without_figures(namespace["report"].verdict)
        else:
            raise AssertionError(f"{page}, line {line}: a block marked {language!r}")
        count += 1
    assert count == page.read_text().count("```") // 2
    assert "helium" in configs


def test_families_that_the_page_points_to_are_there(pytestconfig):
    text = (pytestconfig.rootpath / "docs" / "new_models.md").read_text()
    folder = pytestconfig.rootpath / "sglite" / "models"
    table = text[text.index("| what the model has") : text.index("Helium looks like")]
    names = re.findall(r"`(\w+\.py)`", table)
    assert len(names) > 15
    for name in names:
        assert (folder / name).is_file(), name


def test_links_lead_somewhere(pytestconfig):
    for page in (pytestconfig.rootpath / "docs").glob("*.md"):
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
