"""The machine that a result is measured on. Needs the standard library only."""

import platform
from collections.abc import Iterable
from pathlib import Path

_BUFFER = 1 << 20


def processor() -> str:
    """The processor's name, as far as the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def read_through(paths: Iterable[Path]) -> None:
    """Reads files to their ends, so that they lie in the page cache; folders are left out."""
    buffer = bytearray(_BUFFER)
    for path in paths:
        if path.is_file():
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass
