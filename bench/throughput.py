"""Measures sglite beside other engines: `python bench/throughput.py --peer transformers`.

Four workloads on a checkpoint with random weights, greedy, end tokens ignored:

    single   1 prompt of 128 tokens, 128 new tokens
    batch    32 prompts of 128 tokens, 64 new tokens for each
    shared   32 prompts of 1024 tokens in common and 32 of their own, 32 new tokens for each
    prefill  1 prompt of 2048 tokens, 1 new token; tok/s counts the tokens of the prompt

Each engine lives in a process of its own, and they take turns. Peers that need an environment of
their own get it from `python -m bench.environments NAME`; another interpreter for one is
`--peer NAME --peer-python NAME=/path/to/python`. A peer that cannot run here is left out, and the
result says why.
"""

import argparse
import json
import os
import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console

# A script's own folder is on the path, and not the one that holds the package `bench`.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.comparison import compare
from bench.engines import engine_names
from bench.environments import python_of
from bench.models import CONFIGS, checkpoint_folder, default_cache_folder
from bench.report import markdown, print_tables
from bench.workloads import WORKLOADS

_OURS = "sglite"


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", default="llama-135m", help=f"{', '.join(CONFIGS)}, or the folder of a checkpoint"
    )
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--quantization", choices=["int8"], help="of the weights")
    parser.add_argument(
        "--packed",
        action="store_true",
        help="ours from what `sglite pack` wrote, as peers start from converted files",
    )
    parser.add_argument(
        "--peer",
        action="append",
        default=[],
        choices=[name for name in engine_names() if name != _OURS],
        help="an engine to compare with; may be given again",
    )
    parser.add_argument(
        "--peer-python",
        action="append",
        default=[],
        metavar="NAME=PYTHON",
        help="the interpreter that a peer is installed for (default: that of its environment)",
    )
    parser.add_argument(
        "--workload",
        action="append",
        choices=list(WORKLOADS),
        help="may be given again (default: all)",
    )
    parser.add_argument("--repeats", type=_positive, default=3)
    parser.add_argument("--startups", type=_positive, default=3, help="starts of each engine")
    parser.add_argument("--num-threads", type=_positive, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--cache-folder", type=Path, default=default_cache_folder())
    parser.add_argument(
        "--output", type=Path, metavar="FILE.json", help="also written as tables to FILE.md"
    )
    options = parser.parse_args(arguments)
    pythons = {}
    for pair in options.peer_python:
        name, separator, python = pair.partition("=")
        if not separator or name not in options.peer:
            parser.error(f"--peer-python {pair}: write NAME=PYTHON, with NAME given by --peer")
        pythons[name] = python
    try:
        options.engines = {
            name: pythons.get(name) or python_of(name) for name in [_OURS, *options.peer]
        }
    except ValueError as error:
        parser.error(f"--peer: {error}")
    return options


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return value


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    console, progress = Console(), Console(stderr=True)
    try:
        folder = checkpoint_folder(options.model, options.cache_folder)
    except ValueError as error:
        raise SystemExit(f"--{error}") from None
    result = compare(
        options.engines,
        folder,
        [WORKLOADS[name] for name in options.workload or WORKLOADS],
        dtype=options.dtype,
        quantization=options.quantization,
        cache_folder=options.cache_folder,
        num_threads=options.num_threads,
        repeats=options.repeats,
        startups=options.startups,
        packed=options.packed,
        say=lambda text: progress.print(text, style="dim", highlight=False),
    )
    words = sys.argv[1:] if arguments is None else arguments
    result = {
        "model": Path(options.model).name,
        "command": shlex.join(["python", "bench/throughput.py", *words]),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        **result,
    }
    print_tables(result, console)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(result, indent=1) + "\n")
        options.output.with_suffix(".md").write_text(markdown(result))


if __name__ == "__main__":
    main()
