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

from bench.converted import ConversionError, converted_folder
from bench.engines import EngineError, EngineProcess
from bench.machine import processor, read_through
from bench.models import vocab_size_of
from bench.roofline import kv_bytes_per_token, read_weights
from bench.workloads import Workload

# As a request's last page may not be full: a page for each of 64 requests.
_ROOM = 64 * 16
_ROOT = Path(__file__).resolve().parents[1]


def compare(
    engines: Mapping[str, str],
    folder: Path,
    workloads: Sequence[Workload],
    *,
    dtype: str,
    quantization: str | None,
    cache_folder: Path,
    num_threads: int,
    repeats: int,
    startups: int,
    say: Callable[[str], None],
    packed: bool = False,
) -> dict:
    """Runs every workload on every engine, and gives all that was measured, ready for JSON.

    A peer that fails is left out, and `failures` says why: not every engine runs on every machine.

    Args:
        engines: from the name of each to the Python interpreter that runs it; ours is the first.
        folder: the checkpoint.
        workloads: what to run.
        dtype: of weights and activations.
        quantization: of the weights; None: none.
        cache_folder: for checkpoints in the formats of the peers.
        num_threads: for each engine; only one works at a time.
        repeats: how often each workload runs, every time with other prompts.
        startups: how often each engine starts, with its files in the page cache; the last time it
            stays for the workloads.
        say: is told what is happening.
        packed: whether our engine gets the checkpoint packed, as peers get it converted; its start
            from the checkpoint itself is measured as well.

    Raises:
        EngineError: our engine failed.
    """
    weights = read_weights(folder)
    kv_tokens = max(workload.kv_tokens for workload in workloads) + _ROOM
    result = {
        "machine": {
            "processor": processor(),
            "system": f"{platform.system()} {platform.machine()}",
        },
        "python": platform.python_version(),
        "load_average": os.getloadavg()[0],  # of the minute before: what else is running
        "num_threads": num_threads,
        "dtype": dtype,
        "quantization": quantization,
        "packed": packed,
        "startup_seconds_not_packed": [],
        "weights": dataclasses.asdict(weights),
        "checkpoint_bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
        "kv_bytes": kv_bytes_per_token(folder, dtype) * kv_tokens,
        "limits": [],
        "engines": {},
        "failures": {},
        "workloads": {},
    }
    ours = next(iter(engines))
    alive: dict[str, EngineProcess] = {}

    @contextlib.contextmanager
    def unless_a_peer_fails(name: str, doing: str):
        try:
            yield
        except (EngineError, ConversionError) as error:
            if name == ours:
                raise
            say(f"{name} is left out, {doing}: {error}")
            result["failures"][name] = f"{doing}: {error}"
            alive.pop(name, None)

    with contextlib.ExitStack() as stack:
        for startup in range(startups):
            if packed:
                with EngineProcess(ours, engines[ours], num_threads) as engine:
                    read_through(folder.iterdir())
                    loaded = engine.load(folder, dtype, kv_tokens, quantization)
                    say(f"{ours}, not packed: first token after {loaded['seconds']:.2f} s")
                    result["startup_seconds_not_packed"].append(loaded["seconds"])
                    engine.quit()
            for name, python in engines.items():
                if name in result["failures"]:
                    continue
                with unless_a_peer_fails(name, "start"), contextlib.ExitStack() as one:
                    model = converted_folder(
                        "sglite_packed" if name == ours and packed else name,
                        python,
                        folder,
                        dtype=dtype,
                        quantization=quantization,
                        cache_folder=cache_folder,
                    )
                    engine = one.enter_context(EngineProcess(name, python, num_threads))
                    read_through(model.iterdir())
                    loaded = engine.load(model, dtype, kv_tokens, quantization)
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
                    alive[name] = engine
                    stack.push(one.pop_all())
        for workload in workloads:
            result["workloads"][workload.name] = {
                **dataclasses.asdict(workload),
                "seconds": {name: [] for name in engines},
                "first_tokens": {name: [] for name in engines},
            }
        for repeat in range(repeats):
            # To and fro, so that what drifts does not always fall on the last.
            for workload in workloads if repeat % 2 == 0 else reversed(workloads):
                if workload is workloads[0]:  # one stream, if any is, which memory bounds
                    result["limits"].append(limits_now(num_threads))
                prompts = workload.prompts(repeat, vocab_size_of(folder))
                record = result["workloads"][workload.name]
                for name, engine in list(alive.items()):
                    with unless_a_peer_fails(name, workload.name):
                        answer = engine.run(prompts, workload.new_tokens)
                        rate = workload.counted_tokens / answer["seconds"]
                        say(f"{workload.name} {repeat + 1}/{repeats}, {name}: {rate:.1f} tok/s")
                        record["seconds"][name].append(answer["seconds"])
                        record["first_tokens"][name] += [ids[0] for ids in answer["token_ids"]]
        for name, engine in alive.items():
            result["engines"][name]["peak_memory"] = engine.quit()
    for name in result["failures"]:
        result["engines"].pop(name, None)
        for record in result["workloads"].values():
            del record["seconds"][name], record["first_tokens"][name]
    return result


def limits_now(num_threads: int) -> dict:
    """What the machine can do now, measured in a process that ends before an engine goes on."""
    command = [sys.executable, "-m", "bench.limits", "--num-threads", str(num_threads)]
    return json.loads(subprocess.run(command, cwd=_ROOT, check=True, stdout=-1).stdout)
