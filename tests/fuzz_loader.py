"""Mutated checkpoints: `python -m tests.fuzz_loader --mutations 10000 --seed 0`.

A mutation changes one file of a small checkpoint: bytes anywhere, or values of its JSON. Loading
it works or raises `CheckpointError` with a message that names the file or its folder; within
five seconds, and with less than 1 GB of memory. Child processes do the work, so that a crash
is seen and told with the mutation that caused it.
"""

import argparse
import copy
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

MIB = 1 << 20
SECONDS = 5.0
MEMORY = 1024 * MIB
# Of `tests.quantized_checkpoints`.
_RECIPES = ("gptq", "compressed")
#: What is loaded, by the names of `tests.checkpoints.CONFIGS`, or of recipes for layers of a Llama,
#: and their options.
BASES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma2": {"shard_size": "200KB"},
    "qwen3-moe": {"num_hidden_layers": 1},
    "phi3-long": {},
    **{name: {"num_hidden_layers": 1} for name in _RECIPES},
}
#: Those of `tests.vision_checkpoints`, which are shown a picture once they are loaded.
VISION_BASES = ("qwen2-vl", "llava-next")
_VISION_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "chat_template.json",
)
_SMALL_FILES = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    *_VISION_FILES,
)
# Of a config, which has many other values, this is changed as often as all the rest.
_WHOLE_PART = "quantization_config"
_VALUES = (
    *(None, True, False, 0, -1, 1, 2, 3, 7, 10**4, 10**9, 2**31, 2**63, 10**30, -(10**18)),
    *(0.5, 1e30, -1e-30, float("nan"), float("inf"), "", "x", "../../x", "/etc/passwd", "\ud800"),
    *([], {}, [[]], {"a": {}}, [1] * 100, ["x"] * 3, "y" * 5000),
)
_BYTES = (
    b"",
    b"\0",
    b"\xff",
    b"{",
    b"}",
    b"[",
    b'"',
    b"9" * 30,
    b"-",
    b"e999",
    b"\\ud800",
    b"[" * 999,
)


def mutate(data: bytes, source: random.Random, *, header: bool) -> bytes:
    """The bytes of a file, changed in one place or a few.

    Args:
        data: JSON, or with `header` a safetensors file.
        source: of all choices.
        header: whether the JSON stands behind its length, and before other data.
    """
    if source.random() < 0.35:
        return _mutate_bytes(
            data, source, (8 + int.from_bytes(data[:8], "little")) if header else None
        )
    start, stop = (8, 8 + int.from_bytes(data[:8], "little")) if header else (0, len(data))
    contents = json.loads(data[start:stop])
    part = contents.get(_WHOLE_PART)
    for _ in range(source.choice((1, 1, 1, 2, 4))):
        _mutate_value(part if part and source.random() < 0.5 else contents, source)
    text = json.dumps(contents).encode()
    if not header:
        return text
    length = len(text) if source.random() < 0.9 else source.choice((0, 7, 2**40, 2**64 - 1))
    return length.to_bytes(8, "little") + text + data[stop:]


def _mutate_bytes(data: bytes, source: random.Random, most: int | None) -> bytes:
    place = source.randrange(min(most or len(data), len(data)))
    kind = source.randrange(4)
    if kind == 0:
        return data[:place]
    removed = source.choice((0, 1, 1, 9, 200))
    return data[:place] + source.choice(_BYTES) + data[place + removed :]


def _mutate_value(contents: Any, source: random.Random) -> None:
    """Walks down to some value, and replaces, removes, doubles or renames it."""
    holder, key = None, None
    value = contents
    while isinstance(value, dict | list) and value and (holder is None or source.random() < 0.75):
        holder = value
        # The long lists of a vocabulary are of less interest than what stands around them.
        key = source.choice(list(value) if isinstance(value, dict) else range(min(len(value), 20)))
        value = holder[key]
    if holder is None:
        return
    kind = source.randrange(6)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[source.choice((*holder, "x", "__metadata__", "auto_map", "rope_scaling"))] = value
    elif kind == 2 and isinstance(value, int) and not isinstance(value, bool):
        holder[key] = source.choice(
            (value + 1, value - 1, value * 2, -value, value * 10**6, value << 40)
        )
    else:
        holder[key] = copy.deepcopy(source.choice(_VALUES))  # lists may be changed later on


def fuzz(seed: int, mutations: int, folder: Path) -> list[str]:
    """Loads so many mutations, each from its own seed; returns what went wrong.

    Args:
        seed: of the first one; the next has the next number.
        mutations: how many.
        folder: for files; made by `make_bases`.
    """
    from sglite import CheckpointError

    bases = sorted(path for path in folder.iterdir() if path.name in (*BASES, *VISION_BASES))
    for base in bases:
        load(base)
    problems = []
    target = Path(tempfile.mkdtemp(prefix="mutated-", dir=folder))
    for number in range(seed, seed + mutations):
        source = random.Random(number)
        base = source.choice(bases)
        files = [
            path for path in sorted(base.iterdir()) if path.suffix in (".json", ".safetensors")
        ]
        small = [path for path in files if path.name in _SMALL_FILES]
        chosen = source.choice(files if source.random() < 0.5 else small)
        for path in files:
            if path is not chosen:
                os.link(path, target / path.name)
        header = chosen.suffix == ".safetensors"
        (target / chosen.name).write_bytes(mutate(chosen.read_bytes(), source, header=header))
        (folder / f"at-{os.getpid()}").write_text(f"{number}")
        before, started = peak_memory(reset=True), time.process_time()
        what = f"mutation {number} of {chosen.name} of {base.name}"
        try:
            load(target)
        except CheckpointError as error:
            if str(target) not in str(error):
                problems.append(f"{what}: the message names no file: {error}")
        except BaseException as error:
            where = traceback.extract_tb(error.__traceback__)[-3:]
            problems.append(f"{what}: {type(error).__name__}: {str(error)[:300]} in {where}")
        seconds, memory = time.process_time() - started, peak_memory() - before
        if seconds > SECONDS:
            problems.append(f"{what}: took {seconds:.1f} s of processor time")
        if memory > MEMORY:
            problems.append(f"{what}: took {memory // MIB} MiB")
        for path in target.iterdir():
            path.unlink()
    return problems


def load(folder: Path) -> None:
    """Loads a checkpoint; one that sees looks at a picture, which may fail like any request."""
    from sglite import LLM, SGLiteError

    sees = any((folder / name).exists() for name in _VISION_FILES)
    with LLM(folder, kv_cache_tokens=256 if sees else 64) as llm, suppress(SGLiteError):
        if sees:
            llm.generate("<image>", images=np.zeros((50, 70, 3), np.uint8), max_new_tokens=1)


def peak_memory(*, reset: bool = False) -> int:
    """Bytes that the process has had resident at most since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmHWM")


def make_bases(folder: Path, names: Sequence[str] = (*BASES, *VISION_BASES)) -> None:
    """Writes the checkpoints that are mutated."""
    import numpy as np
    import torch

    from tests import quantized_checkpoints
    from tests.checkpoints import make_checkpoint
    from tests.vision_checkpoints import make_vision_checkpoint

    for name in names:
        if name in _RECIPES:
            recipe = getattr(quantized_checkpoints, name)(np.random.default_rng(0))
            made = make_checkpoint(folder / name, "llama", **BASES[name])
            quantized_checkpoints.quantize_checkpoint(made, *recipe)
            continue
        if name in BASES:
            make_checkpoint(folder / name, name, dtype=torch.bfloat16, **BASES[name])
            continue
        made = make_vision_checkpoint(folder / name, name)
        if name == "llava-next":  # as transformers 5 saves it
            images = json.loads((made / "preprocessor_config.json").read_text())
            (made / "preprocessor_config.json").unlink()
            (made / "processor_config.json").write_text(json.dumps({"image_processor": images}))
        (made / "chat_template.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))


def _child(seed: int, mutations: int, folder: Path, results: Any) -> None:
    results.put(fuzz(seed, mutations, folder))


def run(
    seed: int,
    mutations: int,
    *,
    at_once: int = 500,
    names: Sequence[str] = (*BASES, *VISION_BASES),
) -> list[str]:
    """Fuzzes in child processes, one after the other; returns what went wrong."""
    problems = []
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_bases(folder, names)
        for first in range(seed, seed + mutations, at_once):
            count = min(at_once, seed + mutations - first)
            results = context.SimpleQueue()
            child = context.Process(target=_child, args=(first, count, folder, results))
            child.start()
            problems += _wait_for(child, results, folder)
            print(f"{first + count - seed} mutations, {len(problems)} problems", file=sys.stderr)
    return problems


def _wait_for(child: Any, results: Any, folder: Path) -> list[str]:
    """The child's result; a hang ends it, and so does a crash."""
    place, last, since = folder / f"at-{child.pid}", "", time.monotonic()
    while child.is_alive() and results.empty():
        child.join(0.2)
        now = place.read_text() if place.exists() else ""
        if now != last:
            last, since = now, time.monotonic()
        elif last and time.monotonic() - since > 90:  # five seconds on a machine that is busy
            child.kill()
            child.join()
            return [f"mutation {last}: hangs"]
    if results.empty():
        child.join()
        return [f"mutation {last}: the process died with exit code {child.exitcode}"]
    found = results.get()
    child.join()
    return found


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mutations", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bases", nargs="+", default=(*BASES, *VISION_BASES))
    arguments = parser.parse_args()
    problems = run(arguments.seed, arguments.mutations, names=arguments.bases)
    print("\n".join(problems) or f"{arguments.mutations} mutations: nothing but CheckpointError")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
