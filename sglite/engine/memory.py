"""How much memory this process may still take, and how many KV tokens that gives."""

import os
from pathlib import Path

from sglite import _C
from sglite.interface.errors import OutOfMemoryError

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/proc/self/cgroup")
_CGROUP_ROOT = Path("/sys/fs/cgroup")


def available_memory(mapped_bytes: int = 0) -> int:
    """Bytes that this process can take without swapping or meeting its control group's limit.

    Args:
        mapped_bytes: of files that are to stay in memory, though the system could drop them.
    """
    return max(0, min(_machine_available(), _control_group_available()) - mapped_bytes)


def kv_tokens_that_fit(mem_fraction: float, bytes_per_token: int, mapped_bytes: int = 0) -> int:
    """How many tokens' keys and values fit into a share of the memory that is still available.

    Args:
        mem_fraction: the share.
        bytes_per_token: of keys and values.
        mapped_bytes: as for `available_memory`.

    Raises:
        OutOfMemoryError: not even one.
    """
    available = available_memory(mapped_bytes)
    tokens = int(available * mem_fraction) // bytes_per_token
    if tokens < 1:
        raise OutOfMemoryError(
            f"the KV cache needs {bytes_per_token} bytes for each token; {available} bytes are "
            f"available, of which mem_fraction={mem_fraction} may be used: raise mem_fraction, or "
            f"free memory"
        )
    return tokens


def check_kv_tokens(tokens: int, bytes_per_token: int, mapped_bytes: int = 0) -> int:
    """Gives back `tokens` if the memory that is available holds so many tokens' keys and values.

    Args:
        tokens, bytes_per_token: how many, and the size of each.
        mapped_bytes: as for `available_memory`.

    Raises:
        OutOfMemoryError: it does not.
    """
    available = available_memory(mapped_bytes)
    if tokens * bytes_per_token > available:
        raise OutOfMemoryError(
            f"kv_cache_tokens={tokens} needs {tokens * bytes_per_token} bytes, {bytes_per_token} "
            f"for each token; {available} bytes are available, enough for "
            f"{available // bytes_per_token} tokens"
        )
    return tokens


def give_back_free_memory() -> None:
    """Returns to the system what `malloc` keeps of this process's memory for later.

    What a tokenizer's files become while they are read, weights as they go, and the logits of a
    batch are freed in pieces among others: glibc would hold on to tens of megabytes after each.
    """
    _C.trim_heap()


def _machine_available() -> int:
    if _MEMINFO.exists():
        for line in _MEMINFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    # Elsewhere than on Linux: half of the physical memory, since what is free is not told.
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _control_group_available() -> int:
    """The smallest room that any control group of this process leaves; huge if there is none."""
    room = 1 << 62
    if not _CGROUP.exists():
        return room
    for line in _CGROUP.read_text().splitlines():
        _, controllers, name = line.split(":", 2)
        if controllers == "":  # version 2: one hierarchy
            top, limit, usage, inactive = (
                _CGROUP_ROOT,
                "memory.max",
                "memory.current",
                "inactive_file",
            )
        elif "memory" in controllers.split(","):  # version 1
            top, limit, usage = (
                _CGROUP_ROOT / "memory",
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
            )
            inactive = "total_inactive_file"
        else:
            continue
        folder = top / name.lstrip("/")
        while folder == top or top in folder.parents:
            room = min(room, _room_in_group(folder, limit, usage, inactive))
            folder = folder.parent
    return room


def _room_in_group(folder: Path, limit_name: str, usage_name: str, inactive_name: str) -> int:
    limit_file, usage_file = folder / limit_name, folder / usage_name
    if not limit_file.exists() or not usage_file.exists():
        return 1 << 62
    limit = limit_file.read_text().strip()
    if limit == "max":
        return 1 << 62
    used = int(usage_file.read_text())
    statistics = folder / "memory.stat"
    if statistics.exists():  # page cache that is given up on demand does not count
        for line in statistics.read_text().splitlines():
            name, value = line.split()
            if name == inactive_name:
                used -= int(value)
    return max(0, int(limit) - used)
