"""A file's pages are mapped by a thread that ends with that."""

import mmap
import sys
import threading
from pathlib import Path

import pytest
import torch

from sglite import ops

BYTES = (3 << 20) + 4096  # more than a table of pages, and no multiple of what is mapped at once


def mapped_bytes(path):
    """How much of a file's mapping this process has pages for."""
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    for line in lines:
        if line.endswith(str(path)):
            return next(int(rest.split()[1]) for rest in lines if rest.startswith("Rss:")) << 10
    return None


def wait_for_mapping():
    for thread in threading.enumerate():
        if thread.name == "sglite-map-pages":
            thread.join()


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux which pages are mapped")
def test_a_files_pages_are_mapped(tmp_path):
    path = tmp_path / "contents"
    path.write_bytes(bytes(range(256)) * (BYTES // 256))
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    contents = torch.frombuffer(mapped, dtype=torch.uint8)
    assert mapped_bytes(path) == 0
    ops.map_pages(contents)
    wait_for_mapping()
    assert mapped_bytes(path) == BYTES
    assert contents.view(-1, 256).eq(torch.arange(256)).all()
    del contents
    mapped.close()  # nobody holds on to it


@pytest.mark.parametrize("size", [0, 1, 4096])
def test_little_is_nothing_to_map(size):
    contents = torch.zeros(size, dtype=torch.uint8)
    ops.map_pages(contents)
    assert not contents.any()
