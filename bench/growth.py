"""How cost grows with the batch, the context and the shared prefix: `python -m bench.growth`.

    batch    1 to 64 prompts of 32 tokens, 32 new tokens for each
    context  a prompt that ends 32 tokens before 128 to 8192, and the time of a token after it
    prefix   16 prompts of 512 tokens of which 0 to 100 % are shared, 16 new tokens for each

Writes growth-MODEL.json, .md and three plots, and fails if a larger batch gives our engine fewer
tokens per second. `--curve batch` measures a part again and keeps what the file has of the others,
as a long context takes far longer than all batches.

Plots need matplotlib: `pip install sglite[bench]`.
"""

import argparse
import json
import os
import shlex
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import combinations
from pathlib import Path
from statistics import median

from rich.console import Console

from bench.comparison import compare
from bench.engines import engine_names
from bench.environments import python_of
from bench.models import checkpoint_folder, default_cache_folder
from bench.report import Rows, machine_rows, markdown_rows, print_rows, spread, weights_of
from bench.workloads import Workload

BATCHES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
CONTEXTS = (128, 256, 512, 1024, 2048, 4096, 8192)
SHARES = (0, 25, 50, 75, 100)  # per cent
CURVES = ("batch", "context", "prefix")
_CONTEXT_NEW_TOKENS = 32
_PREFIX_PROMPT_TOKENS = 512
#: What a larger batch may lose in every turn before it counts as slower: less is noise.
_MARGIN = 0.02


def batch_workload(size: int) -> Workload:
    return Workload(f"batch {size}", size, 0, 32, 32)


def context_workload(context: int, new_tokens: int) -> Workload:
    return Workload(
        f"context {context}, {new_tokens} new", 1, 0, context - _CONTEXT_NEW_TOKENS, new_tokens
    )


def prefix_workload(share: int) -> Workload:
    shared = _PREFIX_PROMPT_TOKENS * share // 100
    return Workload(f"prefix {share} %", 16, shared, _PREFIX_PROMPT_TOKENS - shared, 16)


def workloads_of(curve: str, longest: int) -> Iterator[Workload]:
    """What is measured for a curve of a model that takes `longest` tokens of prompt and answer."""
    if curve == "batch":
        yield from map(batch_workload, BATCHES)
    elif curve == "context":
        for context in _contexts(longest):
            yield context_workload(context, 1)
            yield context_workload(context, _CONTEXT_NEW_TOKENS)
    else:
        yield from map(prefix_workload, SHARES)


def _contexts(longest: int) -> list[int]:
    return [context for context in CONTEXTS if context <= longest]


def curves(result: dict, engine: str) -> dict[str, dict[int, list[float]]]:
    """What was measured of one engine: by curve, then by x, a figure for every turn.

    Curves: "batch", new tokens per second; "prefill", seconds to the first token; "decode",
    milliseconds for each token after it; "prefix", seconds for all prompts.
    """

    def seconds(workload: Workload) -> list[float]:
        return result["workloads"][workload.name]["seconds"][engine]

    found = {"batch": {}, "prefill": {}, "decode": {}, "prefix": {}}
    for size in BATCHES:
        workload = batch_workload(size)
        found["batch"][size] = [workload.counted_tokens / turn for turn in seconds(workload)]
    for context in _contexts(result["longest"]):
        first = seconds(context_workload(context, 1))
        all_tokens = seconds(context_workload(context, _CONTEXT_NEW_TOKENS))
        found["prefill"][context] = first
        found["decode"][context] = [
            1e3 * (long - short) / (_CONTEXT_NEW_TOKENS - 1)
            for long, short in zip(all_tokens, first, strict=True)
        ]
    for share in SHARES:
        found["prefix"][share] = seconds(prefix_workload(share))
    return found


def slower_batches(rates: dict[int, list[float]], margin: float = _MARGIN) -> list[tuple[int, int]]:
    """Pairs of a batch and a larger one that gave fewer tokens per second in every turn.

    Args:
        rates: by the size of the batch, tokens per second of every turn.
        margin: the share by which the larger one must be slower.
    """
    return [
        (small, large)
        for small, large in combinations(sorted(rates), 2)
        if all(b < a * (1 - margin) for a, b in zip(rates[small], rates[large], strict=True))
    ]


def merged(earlier: dict, later: dict) -> dict:
    """A result whose curves were measured at different times.

    Raises:
        ValueError: not of the same engines, kind of weights and machine.
    """
    for key in ("machine", "num_threads", "dtype"):
        if earlier[key] != later[key]:
            raise ValueError(f"{key}: {earlier[key]} before, {later[key]} now")
    if earlier["engines"].keys() != later["engines"].keys():
        raise ValueError(
            f"engines: {list(earlier['engines'])} before, {list(later['engines'])} now"
        )
    return {
        **later,
        "command": f"{earlier['command']} ({earlier['date']}), then {later['command']}",
        "limits": earlier["limits"] + later["limits"],
        "workloads": earlier["workloads"] | later["workloads"],
    }


def tables(result: dict) -> list[Rows]:
    """A table for each curve, and the machine's."""
    titles = {
        "batch": ("Batch: new tokens per second", "prompts", 1),
        "prefill": ("Context: seconds to the first token", "context", 3),
        "decode": ("Context: milliseconds for each further token", "context", 2),
        "prefix": ("Shared prefix: seconds for 16 prompts of 512 tokens", "shared, %", 3),
    }
    by_engine = {engine: curves(result, engine) for engine in result["engines"]}
    found = []
    for curve, (title, x_name, digits) in titles.items():
        points = [by_engine[engine][curve] for engine in by_engine]
        cells = [[str(x), *(spread(values[x], digits) for values in points)] for x in points[0]]
        found.append(Rows(title, [x_name, *by_engine], cells))
    return [*found, machine_rows(result)]


def verdict(result: dict) -> str:
    """Whether a larger batch gave fewer tokens per second, for every engine, as a sentence."""
    words = []
    for engine in result["engines"]:
        pairs = slower_batches(curves(result, engine)["batch"])
        slower = ", ".join(f"{large} below {small}" for small, large in pairs)
        words.append(f"{engine}: {slower or 'none'}")
    return (
        f"Larger batches that gave at least {_MARGIN:.0%} fewer tokens per second in every turn: "
        + "; ".join(words)
        + "."
    )


def plot(result: dict, stem: Path) -> list[Path]:
    """Writes STEM-batch.png, STEM-context.png and STEM-prefix.png."""
    from matplotlib.figure import Figure

    by_engine = {engine: curves(result, engine) for engine in result["engines"]}
    pages = {
        "batch": [("batch", "prompts in the batch", "new tokens per second")],
        "context": [
            ("prefill", "tokens of context", "seconds to the first token"),
            ("decode", "tokens of context", "milliseconds for a further token"),
        ],
        "prefix": [("prefix", "shared part of the prompts, %", "seconds for all prompts")],
    }
    files = []
    for page, panels in pages.items():
        figure = Figure(figsize=(6 * len(panels), 4), layout="constrained")
        for axes, (curve, x_name, y_name) in zip(
            figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
        ):
            for engine, measured in by_engine.items():
                x, turns = list(measured[curve]), list(measured[curve].values())
                middle = [median(turn) for turn in turns]
                low = [m - min(turn) for m, turn in zip(middle, turns, strict=True)]
                high = [max(turn) - m for m, turn in zip(middle, turns, strict=True)]
                axes.errorbar(x, middle, (low, high), label=engine, marker="o", capsize=3)
            if curve != "prefix":
                axes.set_xscale("log", base=2)
                axes.set_xticks(x, map(str, x))
                axes.minorticks_off()
            axes.set(xlabel=x_name, ylabel=y_name)
            axes.set_ylim(bottom=0)
            axes.grid(alpha=0.3)
        axes.legend()
        figure.suptitle(f"{result['model']}, {weights_of(result)}, {result['num_threads']} threads")
        files.append(stem.with_name(f"{stem.name}-{page}.png"))
        figure.savefig(files[-1], dpi=100)
    return files


def markdown(result: dict, plots: list[Path]) -> str:
    """The tables and plots as a page."""
    lines = [f"# Growth: {result['model']}, {weights_of(result)}", ""]
    lines += [f"`{result['command']}`, {result['date']}", "", verdict(result), ""]
    for file in plots:
        lines += [f"![{file.stem}]({file.name})", ""]
    for rows in tables(result):
        lines += markdown_rows(rows)
    lines += ["Figures are medians, with the least and the greatest in brackets.", ""]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="llama-135m")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    peers = [name for name in engine_names() if name != "sglite"]
    parser.add_argument("--peer", action="append", default=[], choices=peers)
    parser.add_argument("--curve", action="append", choices=CURVES, help="(default: all)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--num-threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--cache-folder", type=Path, default=default_cache_folder())
    parser.add_argument("--output-folder", type=Path, default=Path("bench/results"))
    options = parser.parse_args(arguments)
    console, progress = Console(), Console(stderr=True)
    folder = checkpoint_folder(options.model, options.cache_folder)
    longest = json.loads((folder / "config.json").read_text())["max_position_embeddings"]
    measured = compare(
        {"sglite": sys.executable, **{name: python_of(name) for name in options.peer}},
        folder,
        [w for curve in options.curve or CURVES for w in workloads_of(curve, longest)],
        dtype=options.dtype,
        quantization=None,
        cache_folder=options.cache_folder,
        num_threads=options.num_threads,
        repeats=options.repeats,
        startups=1,
        say=lambda text: progress.print(text, style="dim", highlight=False),
    )
    for record in measured["workloads"].values():
        del record["first_tokens"]  # who computes the same is the throughput bench's business
    words = sys.argv[1:] if arguments is None else arguments
    result = {
        "model": Path(options.model).name,
        "command": shlex.join(["python", "-m", "bench.growth", *words]),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "longest": longest,
        **measured,
    }
    stem = options.output_folder / f"growth-{result['model']}"
    if options.curve:
        result = merged(json.loads(stem.with_name(stem.name + ".json").read_text()), result)
    options.output_folder.mkdir(parents=True, exist_ok=True)
    stem.with_name(stem.name + ".json").write_text(json.dumps(result) + "\n")
    stem.with_name(stem.name + ".md").write_text(markdown(result, plot(result, stem)))
    for rows in tables(result):
        print_rows(rows, console)
    console.print(verdict(result))
    return 1 if slower_batches(curves(result, "sglite")["batch"]) else 0


if __name__ == "__main__":
    raise SystemExit(main())
