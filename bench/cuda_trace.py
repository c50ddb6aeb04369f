"""What the GPU does in decode steps, from torch's profiler: kernels of a step, and idle time.

Where a kernel starts before the one before it has ended (programmatic dependent launch), its time
holds its waiting. What it adds is the time from the end of all before it to its own end: over a
step, that sums up to the time in which the GPU was busy.
"""

import json
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch

_GPU = ("kernel", "gpu_memcpy", "gpu_memset")
#: A launch with at least so many kernels is the graph of a step.
_GRAPH_KERNELS = 6


@contextmanager
def recorded_trace() -> Iterator[list[dict]]:
    """The GPU's events of the block, as Chrome's trace format has them, once it has ended."""
    events: list[dict] = []
    # Without the CPU's activities, whose recording would hold up the engine.
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        yield events
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        events += gpu_events(json.loads(file.read_text())["traceEvents"])


def gpu_events(events: Sequence[dict]) -> list[dict]:
    """Of all events those of the GPU, in order of time."""
    return sorted((e for e in events if e.get("cat") in _GPU), key=lambda event: event["ts"])


def describe_steps(events: Sequence[dict]) -> dict:
    """Period, gaps and kernels of the steps that ran as CUDA graphs.

    Args:
        events: from `gpu_events`; times in microseconds.

    Returns:
        `steps`: how many graphs were replayed; `period_us`: from the start of one to the next;
        `span_us`: from a graph's first kernel to its last one's end; `gap_us`: from there to the
        next graph's start; `idle_us`: the part of the gap in which the GPU did nothing at all (all
        medians); `max_idle_us`; `kernels`: per name how many in a step, their mean time, and what
        they add to a step. Only `steps` where no graph was replayed.
    """
    by_launch = defaultdict(list)
    for event in events:
        by_launch[event["args"].get("correlation")].append(event)
    graphs = [group for group in by_launch.values() if len(group) >= _GRAPH_KERNELS]
    graphs.sort(key=lambda group: group[0]["ts"])
    # Another batch size than that of most replays is not the step that is looked at.
    usual = median([len(group) for group in graphs]) if graphs else 0
    graphs = [group for group in graphs if len(group) == usual]
    if len(graphs) < 3:
        return {"steps": len(graphs)}
    starts = [min(event["ts"] for event in group) for group in graphs]
    ends = [max(event["ts"] + event["dur"] for event in group) for group in graphs]
    pairs = list(zip(ends, starts[1:], strict=False))
    idle = [_idle(events, end, start) for end, start in pairs]
    return {
        "steps": len(graphs),
        "period_us": median(b - a for a, b in pairwise(starts)),
        "span_us": median(end - start for start, end in zip(starts, ends, strict=True)),
        "gap_us": median(start - end for end, start in pairs),
        "idle_us": median(idle),
        "max_idle_us": max(idle),
        "kernels": _kernel_table(graphs),
    }


def _idle(events: Sequence[dict], begin: float, end: float) -> float:
    """How long within a stretch of time no event was under way."""
    idle, busy_until = 0.0, begin
    for event in events:
        start, stop = event["ts"], event["ts"] + event["dur"]
        if stop <= begin or start >= end:
            continue
        idle += max(0.0, start - busy_until)
        busy_until = max(busy_until, stop)
    return idle + max(0.0, end - busy_until)


def _kernel_table(graphs: Sequence[Sequence[dict]]) -> list[dict]:
    durations, added = defaultdict(list), defaultdict(float)
    for group in graphs:
        busy_until = 0.0
        for event in sorted(group, key=lambda event: event["ts"]):
            start, end = event["ts"], event["ts"] + event["dur"]
            durations[event["name"]].append(event["dur"])
            added[event["name"]] += max(0.0, end - max(start, busy_until))
            busy_until = max(busy_until, end)
    rows = [
        {
            "name": name,
            "per_step": len(times) / len(graphs),
            "mean_us": sum(times) / len(times),
            "added_us": added[name] / len(graphs),
        }
        for name, times in durations.items()
    ]
    return sorted(rows, key=lambda row: -row["added_us"])
