"""Kernels on processors that other processes keep busy."""

import os
import subprocess
import sys
import threading
import time

import pytest
import torch

from sglite import _C, ops

NEIGHBOUR = "import time\nend = time.monotonic() + 120\nwhile time.monotonic() < end: pass"


@pytest.fixture
def neighbours():
    """A process on every processor that does nothing else."""
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one processor: kernels run in one thread")
    command = [sys.executable, "-c", NEIGHBOUR]
    processes = [subprocess.Popen(command) for _ in os.sched_getaffinity(0)]
    yield
    for process in processes:
        process.kill()
        process.wait()


def seconds_of_small_regions(threads):
    """In a thread of its own, beside whose own helper and the caller's OpenMP's threads sleep."""
    x, weight = torch.ones(64, 2048), torch.ones(2048)
    found = []

    def work():
        _C.set_num_threads(threads)
        start = time.perf_counter()
        for _ in range(1000):
            ops.rms_norm(x, weight, 1e-6)
        found.append(time.perf_counter() - start)

    torch.ones(1 << 20).exp()
    worker = threading.Thread(target=work)
    worker.start()
    worker.join()
    return found[0]


def test_regions_do_not_wait_for_threads_that_get_no_processor(neighbours):
    alone, together = zip(
        *[(seconds_of_small_regions(1), seconds_of_small_regions(2)) for _ in range(3)], strict=True
    )
    assert min(together) < 4 * min(alone)
