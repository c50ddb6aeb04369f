"""How long a checkpoint takes to load, part by part: `python -m bench.load qwen3-0.6b`.

In every turn one process reads the files, and one for each kind of weight makes an `LLM` and
generates one token, with the files in the page cache; "packed" is what `sglite.pack` wrote of the
checkpoint. The files are read into one small buffer again and
again, and whole into new memory, as weights have to end up. Loading packs the weights into new
memory, too, which the system has to clear first; on a virtual machine whose host takes back what
has been free for some seconds (free page reporting), getting it again takes ten times longer.
`--settle 4` waits for that in every process, so that all of them pay it.
"""

import argparse
import json
import os
import re
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

from rich.console import Console

from bench.converted import packed_folder
from bench.machine import processor, read_through
from bench.models import checkpoint_folder, default_cache_folder
from bench.report import Rows, markdown_rows, print_rows, spread

_ROOT = Path(__file__).resolve().parents[1]
#: What is timed inside `LLM(...)`: the module in which a function is looked up, its name, a label.
_PARTS = (
    ("sglite.loading", "resolve_checkpoint", "folder and config.json"),
    ("sglite.models.from_checkpoint", "load_tokenizer", "tokenizer"),
    ("sglite.models.loader", "read_config", "config"),
    ("sglite.models.loader", "SafetensorsFile", "headers"),
    ("sglite.models.loader", "_build", "modules"),
    ("sglite.models.loader", "load_weights", "weights, read and packed"),
    ("sglite.models.loader", "map_weights", "weights, mapped"),
    ("sglite.loading", "make_engine", "engine and KV pool"),
)
_WHOLE = ("LLM(...)", "first token", "start-up: both")
_READ = "read"
_PACKED = "packed"
_READS = ("reading, one small buffer", "reading, into new memory")


def read_once(folder: Path, settle: float) -> dict:
    """One turn of reading, in this process."""
    files = sorted(folder.glob("*.safetensors"))
    read_through(files)  # into the page cache
    time.sleep(settle)
    seconds: dict[str, float] = {}
    with _timed(seconds, _READS[0]):
        read_through(files)
    with _timed(seconds, _READS[1]):
        held = [file.read_bytes() for file in files]
    del held
    return {"seconds": seconds}


def load_once(options: argparse.Namespace) -> dict:
    """One turn of loading, here: seconds of each part, processor seconds, and bytes of memory."""
    folder = checkpoint_folder(options.model, options.cache_folder)
    if options.once == _PACKED:
        folder = packed_folder(folder, "bfloat16", None, options.cache_folder)
    import torch

    import sglite.llm

    torch.set_num_threads(options.num_threads)
    read_through(sorted(folder.glob("*.safetensors")))
    time.sleep(options.settle)
    seconds: dict[str, float] = {}
    for module, name, label in _PARTS:
        _time_calls(sys.modules[module], name, seconds, label)
    before = _memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    start = resource.getrusage(resource.RUSAGE_SELF)
    with _timed(seconds, _WHOLE[0]):
        llm = sglite.llm.LLM(
            str(folder),
            device="cpu",
            quantization=None if options.once in ("bfloat16", _PACKED) else options.once,
            num_threads=options.num_threads,
            kv_cache_tokens=4096,
        )
    with _timed(seconds, _WHOLE[1]):
        llm.generate(list(range(1, 17)), max_new_tokens=1, temperature=0)
    stop = resource.getrusage(resource.RUSAGE_SELF)
    seconds[_WHOLE[2]] = seconds[_WHOLE[0]] + seconds[_WHOLE[1]]
    return {
        "seconds": seconds,
        "processor_seconds": stop.ru_utime + stop.ru_stime - start.ru_utime - start.ru_stime,
        "peak_bytes_above_imports": _memory("VmHWM") - before,
    }


@contextmanager
def _timed(seconds: dict[str, float], label: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[label] = seconds.get(label, 0.0) + time.perf_counter() - start


def _time_calls(module: object, name: str, seconds: dict[str, float], label: str) -> None:
    function = getattr(module, name)

    def timed(*arguments: object, **keywords: object) -> object:
        with _timed(seconds, label):
            return function(*arguments, **keywords)

    setattr(module, name, timed)


def _memory(kind: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(re.search(kind + r":\s+(\d+) kB", status)[1]) * 1024


def compare(options: argparse.Namespace) -> dict:
    """All turns, each kind of weight after the other in every turn."""
    folder = checkpoint_folder(options.model, options.cache_folder)
    kinds = [_READ, *options.weights]
    turns: dict[str, list[dict]] = {kind: [] for kind in kinds}
    for _ in range(options.repeats):
        for kind in kinds:
            command = [sys.executable, "-m", "bench.load", options.model, "--once", kind]
            command += ["--num-threads", str(options.num_threads)]
            command += ["--settle", str(options.settle)]
            command += ["--cache-folder", str(options.cache_folder)]
            output = subprocess.run(command, cwd=_ROOT, check=True, stdout=subprocess.PIPE).stdout
            turns[kind].append(json.loads(output.splitlines()[-1]))
    return {
        "model": options.model,
        "num_threads": options.num_threads,
        "machine": processor(),
        "load_average": os.getloadavg()[0],
        "file_bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
        "turns": turns,
    }


def table(result: dict) -> Rows:
    """Medians, with the least and the greatest in brackets."""
    kinds = dict(result["turns"])
    reads = kinds.pop(_READ)
    cells = []
    for label in _READS:
        figure = spread([turn["seconds"][label] for turn in reads], 2)
        cells.append([f"{label}, s", *(figure for _ in kinds)])
    for label in [*(label for _, _, label in _PARTS), *_WHOLE]:
        figures = (
            [turn["seconds"][label] for turn in turns if label in turn["seconds"]]
            for turns in kinds.values()
        )
        cells.append([f"{label}, s", *(spread(values, 2) if values else "" for values in figures)])
    for label in _READS:
        row = [f"start-up / {label}"]
        for turns in kinds.values():
            pairs = zip(turns, reads, strict=True)
            row.append(spread([a["seconds"][_WHOLE[2]] / b["seconds"][label] for a, b in pairs], 2))
        cells.append(row)
    processor_seconds = ([t["processor_seconds"] for t in turns] for turns in kinds.values())
    cells.append(["processor seconds", *(spread(values, 2) for values in processor_seconds)])
    peaks = (median(t["peak_bytes_above_imports"] for t in turns) for turns in kinds.values())
    cells.append(["peak memory above imports, MB", *(f"{peak / 1e6:.0f}" for peak in peaks)])
    cells.append(["files, MB", *(f"{result['file_bytes'] / 1e6:.0f}" for _ in kinds)])
    return Rows(f"Loading {result['model']}, files in the page cache", ["part", *kinds], cells)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a name in bench.models, or a folder")
    parser.add_argument(
        "--weights", nargs="+", default=["bfloat16", "int8", _PACKED], metavar="KIND"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--settle", type=float, default=0.0, metavar="SECONDS", help="(default: 0)")
    parser.add_argument("--num-threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--cache-folder", type=Path, default=default_cache_folder())
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="and FILE.md")
    parser.add_argument("--once", metavar="KIND", help="one turn here, as a line of JSON")
    options = parser.parse_args()
    if options.once:
        if options.once == _READ:
            folder = checkpoint_folder(options.model, options.cache_folder)
            print(json.dumps(read_once(folder, options.settle)))
        else:
            print(json.dumps(load_once(options)))
        return
    result = {
        "command": shlex.join(["python", "-m", "bench.load", *sys.argv[1:]]),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        **compare(options),
    }
    rows = table(result)
    print_rows(rows, Console())
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n")
        lines = ["# Loading", ""]
        lines += [f"`{result['command']}`, {result['date']}, {result['machine']}, load average at "]
        lines += [f"the end {result['load_average']:.1f}", ""]
        options.output.with_suffix(".md").write_text("\n".join([*lines, *markdown_rows(rows)]))


if __name__ == "__main__":
    main()
