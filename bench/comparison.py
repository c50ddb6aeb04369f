"""Measures engines in turns: repeat by repeat, workload by workload, one engine after the other."""

import contextlib
import dataclasses
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from bench.engines import EngineProcess
from bench.machine import processor
from bench.models import vocab_size_of
from bench.roofline import read_weights
from bench.workloads import Workload

_ROOT = Path(__file__).resolve().parents[1]


def compare(
    engines: Mapping[str, str],
    folder: Path,
    workloads: Sequence[Workload],
    *,
    dtype: str,
    num_threads: int,
    repeats: int,
    startups: int,
    say: Callable[[str], None],
) -> dict:
    """Runs every workload on every engine, and gives all that was measured, ready for JSON.

    Args:
        engines: from the name of each to the Python interpreter that runs it.
        folder: the checkpoint.
        workloads: what to run.
        dtype: of weights and activations.
        num_threads: for each engine; only one works at a time.
        repeats: how often each workload runs, every time with other prompts.
        startups: how often each engine starts; the last time it stays for the workloads.
        say: is told what is happening.

    Raises:
        EngineError: an engine failed.
    """
    weights = read_weights(folder)
    result = {
        "machine": {
            "processor": processor(),
            "system": f"{platform.system()} {platform.machine()}",
        },
        "python": platform.python_version(),
        "load_average": os.getloadavg()[0],  # of the minute before: what else is running
        "num_threads": num_threads,
        "dtype": dtype,
        "weights": dataclasses.asdict(weights),
        "limits": [],
        "engines": {},
        "workloads": {},
    }
    kv_tokens = max(workload.kv_tokens for workload in workloads)
    with contextlib.ExitStack() as stack:
        alive = []
        for startup in range(startups):
            for name, python in engines.items():
                engine = stack.enter_context(EngineProcess(name, python, num_threads))
                loaded = engine.load(folder, dtype, kv_tokens)
                say(f"{name}: first token after {loaded['seconds']:.2f} s")
                record = result["engines"].setdefault(
                    name, {"import_seconds": [], "startup_seconds": []}
                )
                record["import_seconds"].append(engine.import_seconds)
                record["startup_seconds"].append(loaded["seconds"])
                if startup < startups - 1:
                    engine.quit()
                    continue
                record["about"] = loaded["about"]
                record["memory_after_imports"] = engine.memory_after_imports
                alive.append(engine)
        for workload in workloads:
            result["workloads"][workload.name] = {
                **dataclasses.asdict(workload),
                "seconds": {name: [] for name in engines},
                "first_tokens": {name: [] for name in engines},
            }
        for repeat in range(repeats):
            result["limits"].append(limits_now(num_threads))
            for workload in workloads:
                prompts = workload.prompts(repeat, vocab_size_of(folder))
                record = result["workloads"][workload.name]
                for engine in alive:
                    answer = engine.run(prompts, workload.new_tokens)
                    rate = workload.counted_tokens / answer["seconds"]
                    say(f"{workload.name} {repeat + 1}/{repeats}, {engine.name}: {rate:.1f} tok/s")
                    record["seconds"][engine.name].append(answer["seconds"])
                    record["first_tokens"][engine.name] += [ids[0] for ids in answer["token_ids"]]
        for engine in alive:
            result["engines"][engine.name]["peak_memory"] = engine.quit()
    return result


def limits_now(num_threads: int) -> dict:
    """What the machine can do now, measured in a process that ends before an engine goes on."""
    command = [sys.executable, "-m", "bench.limits", "--num-threads", str(num_threads)]
    return json.loads(subprocess.run(command, cwd=_ROOT, check=True, stdout=-1).stdout)
