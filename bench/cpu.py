"""The whole comparison on a CPU, in one command: `python -m bench.cpu`.

For each model: the four workloads in bfloat16 beside every peer that is installed (see
`bench.environments`), then one stream with int8 weights. Writes throughput-MODEL.json and
throughput-MODEL-int8.json with their tables, and cpu.md: what was to be reached, and whether it is.
A part in which our own engine fails is left out. `--summary` makes cpu.md from the files there.
"""

import argparse
import json
import os
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from rich.console import Console

from bench import throughput
from bench.engines import EngineError
from bench.environments import ENVIRONMENTS, is_installed
from bench.models import default_cache_folder
from bench.report import Rows, bracket, markdown_rows, print_rows, rates, reached_share

MODELS = ("llama-135m", "qwen3-0.6b")
#: How many times the tok/s of the best peer each workload is to reach.
FACTORS = {"single": 1.1, "batch": 1.3, "shared": 1.5, "prefill": 1.1}
INT8_FACTOR = 1.15
READING_SHARE = 0.85
MEMORY_ROOM = 200e6
#: Engines without int8 weights on a CPU.
_NO_INT8 = ("transformers", "vllm_cpu")


def goals(result: dict) -> Iterator[list[str]]:
    """What one result was to reach: goal, ours, the best peer's, ratio, wanted, reached.

    The best peer of each workload is meant, whichever it is: a ratio is ours over its.
    """
    quantized = result["quantization"] is not None
    for name in result["workloads"]:
        factor = INT8_FACTOR if quantized else FACTORS[name]
        yield _rate_goal(result, name, factor)
    if not quantized and "single" in result["workloads"]:
        share = reached_share(result, "single")
        wanted = f"{READING_SHARE:.0%}"
        yield ["single, share of the limit", f"{share:.0%}", "", "", wanted, _mark(share >= 0.85)]
    if not quantized:
        mine = result["engines"][next(iter(result["engines"]))]["startup_seconds"]
        if result.get("packed"):
            yield _startup_goal(result, "start-up to first token, packed, s", mine)
            mine = result["startup_seconds_not_packed"]
        yield _startup_goal(result, "start-up to first token, s", mine)
    yield _memory_goal(result)


def _rate_goal(result: dict, name: str, factor: float) -> list[str]:
    ours, *peers = result["engines"]
    mine = rates(result, name, ours)
    label = f"{name}, tok/s"
    if not peers:
        return [label, f"{median(mine):.1f}", "no peer", "", f"{factor:.2f}", ""]
    best = max(peers, key=lambda peer: median(rates(result, name, peer)))
    theirs = rates(result, name, best)
    ratio = median(mine) / median(theirs)
    in_turn = [a / b for a, b in zip(mine, theirs, strict=True)]
    return [
        label,
        f"{median(mine):.1f}",
        f"{best} {median(theirs):.1f}",
        bracket(ratio, in_turn, 2),
        f"{factor:.2f}",
        _mark(ratio >= factor),
    ]


def _startup_goal(result: dict, label: str, seconds: list[float]) -> list[str]:
    """Start-up beside llama.cpp, which maps its file and starts faster than every other peer."""
    mine = median(seconds)
    if "llama_cpp" not in result["engines"]:
        return [label, f"{mine:.2f}", "no llama_cpp", "", "1.00", ""]
    theirs = median(result["engines"]["llama_cpp"]["startup_seconds"])
    ratio = theirs / mine
    reached = _mark(ratio >= 1)
    return [label, f"{mine:.2f}", f"llama_cpp {theirs:.2f}", f"{ratio:.2f}", "1.00", reached]


def _memory_goal(result: dict) -> list[str]:
    record = next(iter(result["engines"].values()))
    used = record["peak_memory"] - record["memory_after_imports"]
    stored = result["checkpoint_bytes"] // (2 if result["quantization"] else 1)
    allowed = stored + result["kv_bytes"] + MEMORY_ROOM
    label = "peak memory above imports, MB"
    return [label, f"{used / 1e6:.0f}", "", "", f"{allowed / 1e6:.0f}", _mark(used <= allowed)]


def _mark(is_reached: bool) -> str:
    return "yes" if is_reached else "no"


def summary(results: list[dict]) -> Rows:
    """All results beside what was to be reached."""
    cells = []
    for result in results:
        label = result["model"] + (f", {result['quantization']}" if result["quantization"] else "")
        cells += [[label, *row] for row in goals(result)]
    columns = ["model", "what", "sglite", "best peer", "ratio", "to reach", "reached"]
    return Rows("What was to be reached", columns, cells)


def _page(rows: Rows, results: list[dict]) -> str:
    lines = ["# On a CPU, beside other engines", "", "`python -m bench.cpu`, from", ""]
    lines += [f"* `{result['command']}`, {result['date']}" for result in results]
    lines += ["", *markdown_rows(rows)]
    lines += [
        "Ratios are ours over the best peer's of that workload (start-up: its time over ours), of "
        "medians; the bracket holds those of single turns. The limit of one stream is reading all "
        'weights once a token at the streaming rate of the same turn. "Packed" starts from what '
        "`sglite pack` wrote, as llama.cpp from a converted file. Memory may be the checkpoint "
        "(half of it in int8), the KV pool and 200 MB.",
        "",
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", action="append", help=f"(default: {', '.join(MODELS)})")
    parser.add_argument(
        "--peer", action="append", help="(default: transformers, and all that are installed)"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--startups", type=int, default=3)
    parser.add_argument("--num-threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--cache-folder", type=Path, default=default_cache_folder())
    parser.add_argument("--output-folder", type=Path, default=Path("bench/results"))
    parser.add_argument("--summary", action="store_true", help="measure nothing")
    options = parser.parse_args(arguments)
    peers = options.peer or ["transformers", *filter(is_installed, ENVIRONMENTS)]
    files, failures = [], []
    for model in options.model or MODELS:
        for quantization in (None, "int8"):
            name = Path(model).name + (f"-{quantization}" if quantization else "")
            files.append(options.output_folder / f"throughput-{name}.json")
            if options.summary:
                continue
            command = ["--model", model, "--packed", "--output", str(files[-1])]
            command += ["--repeats", str(options.repeats), "--startups", str(options.startups)]
            command += ["--num-threads", str(options.num_threads)]
            if options.cache_folder != default_cache_folder():
                command += ["--cache-folder", str(options.cache_folder)]
            taking_part = peers
            if quantization:
                command += ["--quantization", quantization, "--workload", "single"]
                taking_part = [peer for peer in peers if peer not in _NO_INT8]
            try:
                throughput.main(
                    command + [word for peer in taking_part for word in ("--peer", peer)]
                )
            except EngineError as error:  # the other parts took long to measure
                failures.append(f"{name}: {error}")
    results = [json.loads(file.read_text()) for file in files if file.exists()]
    rows = summary(results)
    print_rows(rows, Console())
    (options.output_folder / "cpu.md").write_text(_page(rows, results))
    if failures:
        raise SystemExit("\n".join(failures))


if __name__ == "__main__":
    main()
