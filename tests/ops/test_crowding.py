"""Kernels on processors that others keep busy; `bench/busy_neighbours.py` measures them."""

import os

import pytest
import torch

from bench.busy_neighbours import neighbours, seconds
from sglite import _C, ops


def test_results_stay_the_same_while_threads_come_late_and_go():
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one processor: kernels run in one thread")
    x, weight = torch.randn(64, 256), ops.pack_weight(torch.randn(512, 256))
    alone = ops.linear(x, weight)
    _C.set_num_threads(2)
    try:
        with neighbours(len(os.sched_getaffinity(0))):
            found = [ops.linear(x, weight) for _ in range(300)]
    finally:
        _C.set_num_threads(0)
    assert all(torch.equal(each, alone) for each in found)


def test_the_measurement_runs():
    assert seconds(2, count=3) > 0
