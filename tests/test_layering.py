"""The floors of the library: imports only point down."""

import ast
from pathlib import Path

import sglite

PACKAGE = Path(sglite.__file__).parent

# Room to floor. A room imports from itself and from lower floors; rooms of one floor (engine and
# models, say) never import each other. `_C` is the extension, csrc/.
FLOORS = {
    "__init__": 8,
    "__main__": 8,
    "tools": 7,
    "llm": 6,
    "loading": 5,
    "engine": 4,
    "models": 4,
    "layers": 3,
    "cache": 3,
    "ops": 2,
    "multimodal": 2,
    "interface": 1,
    "_C": 1,
}


def room_of(module: str) -> str:
    """The room that "sglite.room.file" is in; "__init__" for the package itself."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imported_rooms(source: str, module: str) -> list[tuple[str, int]]:
    """The rooms that a file imports from, anywhere in it, with line numbers."""
    rooms = []
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = module.split(".")[: -node.level]
                base = ".".join([*parent, base] if base else parent)
            # `from sglite import ops` names a room; `from sglite import LLM` the package itself.
            is_package = base == "sglite"
            names = [
                f"sglite.{alias.name}" if is_package and alias.name in FLOORS else base
                for alias in node.names
                if not (is_package and alias.name == "__version__")  # a constant, above nothing
            ]
        rooms += [(room_of(name), node.lineno) for name in names if name.split(".")[0] == "sglite"]
    return rooms


def violations(source: str, module: str) -> list[str]:
    """The imports of one file that do not point down."""
    own = room_of(module)
    return [
        f"{module}, line {line}: {own} (floor {FLOORS[own]}) imports {room} (floor {FLOORS[room]})"
        for room, line in imported_rooms(source, module)
        if room != own and FLOORS[room] >= FLOORS[own]
    ]


def test_imports_only_point_down():
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        module = ".".join(("sglite", *(parts if parts != ("__init__",) else ())))
        assert room_of(module) in FLOORS, f"{path} is on no floor"
        found += violations(path.read_text(encoding="utf-8"), module)
    assert not found, "\n".join(found)


def test_the_check_sees_what_is_forbidden():
    for source in (
        "import sglite.engine.engine",
        "from sglite.engine import engine",
        "from sglite import LLM",
        "from ..engine import engine",
        "def f():\n    from sglite.llm import LLM",
    ):
        assert violations(source, "sglite.models.llama"), source
    for source in ("from sglite import ops", "from . import llama", "import torch"):
        assert not violations(source, "sglite.models.llama"), source
