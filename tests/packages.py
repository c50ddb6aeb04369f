"""The packages of `examples/`, copied and run as somebody else's."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import sglite

_EXAMPLES = Path(__file__).parents[1] / "examples"
#: What has to be on the path for `import sglite`.
ROOT = str(Path(sglite.__file__).parents[1])


def copy_package(name: str, target: Path) -> Path:
    """A copy of an example below `target`, since building leaves files behind."""
    return Path(shutil.copytree(_EXAMPLES / name, target / name))


def copy_checkpoint(source: Path, target: Path, architecture: str) -> Path:
    """A copy of a checkpoint below `target` that asks for another class."""
    folder = Path(shutil.copytree(source, target / "model"))
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = [architecture]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def run(python, *arguments, cwd, **variables) -> subprocess.CompletedProcess:
    """Runs an interpreter with these variables and none of this library's own beside them."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("SGLITE_")
    }
    return subprocess.run(
        [str(python), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=cwd,
        env={**environment, **variables},
    )
