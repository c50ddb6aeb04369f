"""Files of a checkpoint, which come from strangers."""

import json
from pathlib import Path
from typing import Any

from sglite.interface.errors import CheckpointError


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None if there is no such file.

    Raises:
        CheckpointError: it is no regular file, which might be read forever, or cannot be read, or
            holds something else.
    """
    if not path.exists():
        return None
    if not path.is_file():
        raise CheckpointError(f"{path} is no regular file")
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(contents, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not a {type(contents).__name__}")
    return contents
