"""Where a decode step on the CPU spends its time: `python -m bench.step_profile`.

Requests of one length decode together, greedily; each figure is the median over the steps. A layer
is one op; it is shown as such, and then with its ops called one by one, which costs more. Bytes
are what the tensors of a stage hold (of the cache, what is seen), and the limit of a stage is the
longer of reading them at this machine's streaming speed and of its products at the machine's
arithmetic peak, both measured in the same run, before and after: the better counts, since whatever
else runs only lowers them. The host's figures are processor time of the thread that runs the steps,
which other processes disturb less; the timers' own cost, about a microsecond for each call, is a
part of them.
"""

import argparse
import json
import os
import shlex
import statistics
import sys
from datetime import UTC, datetime
from itertools import product
from pathlib import Path

from rich.console import Console

from bench.comparison import limits_now
from bench.machine import processor
from bench.models import checkpoint_folder, default_cache_folder, vocab_size_of
from bench.report import Rows, markdown_rows, print_rows
from bench.step_recorder import Part, StepRecord, StepRecorder
from bench.workloads import Workload
from sglite import _C, LLM


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="llama-135m")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--context", type=int, default=128, help="tokens of each prompt")
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--option", action="append", default=[], metavar="NAME=JSON", help="of LLM")
    parser.add_argument("--num-threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--cache-folder", type=Path, default=default_cache_folder())
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="and FILE.md")
    return parser.parse_args(arguments)


def profile(options: argparse.Namespace) -> dict:
    """Everything that was measured, ready for JSON."""
    folder = checkpoint_folder(options.model, options.cache_folder)
    limits = [limits_now(options.num_threads)]
    largest = max(options.batch) * (options.context + options.steps + 17)
    extra = dict(option.split("=", 1) for option in options.option)
    batches = {}
    with LLM(
        str(folder),
        device="cpu",
        dtype=options.dtype,
        num_threads=options.num_threads,
        kv_cache_tokens=largest + 1024,
        prefix_cache=False,
        **{name: json.loads(value) for name, value in extra.items()},
    ) as llm:
        for batch, by_stage in product(options.batch, (False, True)):
            recorder = StepRecorder(llm, by_stage=by_stage)
            workload = Workload("steps", batch, 0, options.context, options.steps)
            for repeat in range(2):  # the first one warms up
                prompts = workload.prompts(repeat, vocab_size_of(folder))
                with recorder.recording() as records:
                    llm.generate(
                        prompts,
                        max_new_tokens=options.steps,
                        temperature=0,
                        ignore_eos=True,
                        progress=False,
                    )
            name = f"batch {batch}, layers by stage" if by_stage else f"batch {batch}"
            batches[name] = _summary([record for record in records if record.rows == batch])
    limits.append(limits_now(options.num_threads))
    return {
        "model": options.model,
        "dtype": options.dtype,
        "context": options.context,
        "num_threads": options.num_threads,
        "machine": processor(),
        "cpu_path": _C.cpu_path(),
        "limits": limits,
        "batches": batches,
    }


def _summary(records: list[StepRecord]) -> dict:
    """Medians over steps of one size."""
    return {
        "steps": len(records),
        "seconds": statistics.median(record.seconds for record in records),
        "op_calls": records[-1].ops and sum(part.calls for part in records[-1].ops.values()),
        "questions": records[-1].questions,
        "ops": _medians([record.ops for record in records]),
        "host": _medians([record.host for record in records]),
    }


def _medians(parts: list[dict[str, Part]]) -> dict[str, dict]:
    last = parts[-1]
    return {
        name: {
            "seconds": statistics.median(found[name].seconds for found in parts),
            "busy_seconds": statistics.median(found[name].busy_seconds for found in parts),
            "calls": part.calls,
            "bytes": part.bytes,
            "operations": part.operations,
        }
        for name, part in last.items()
    }


def tables(result: dict) -> list[Rows]:
    """For each batch the stages, then what the host does between them."""
    gigabytes, gigaflops = (
        max(limits[name] for limits in result["limits"])
        for name in ("read_gigabytes_per_second", "matmul_gigaflops_per_second")
    )
    found = []
    for batch, record in result["batches"].items():
        cells = []
        total = Part()
        for name, op in sorted(record["ops"].items(), key=lambda item: -item[1]["seconds"]):
            cells.append(_stage(name, op, gigabytes, gigaflops))
            for field in ("seconds", "calls", "bytes", "operations"):
                setattr(total, field, getattr(total, field) + op[field])
        cells.append(_stage("all ops", vars(total), gigabytes, gigaflops))
        whole = {**vars(total), "seconds": record["seconds"]}
        cells.append(_stage("step", whole, gigabytes, gigaflops))
        title = f"{result['model']}, {result['dtype']}, {batch}, context {result['context']}"
        columns = ["stage", "calls", "ms", "MB", "GB/s", "GFLOP/s", "limit, ms", "reached"]
        found.append(Rows(title, columns, cells))
        busy = {name: part["busy_seconds"] for name, part in record["host"].items()}
        host = [[name, f"{seconds * 1e3:.3f}"] for name, seconds in busy.items()]
        calling = busy["calling the ops"]
        outside = sum(busy.values()) - calling
        host.append(["outside the model: all but calling the ops", f"{outside * 1e3:.3f}"])
        calls = total.calls
        host.append([f"calling an op, us, of {calls} calls", f"{calling * 1e6 / calls:.2f}"])
        host.append(["questions to the extension", str(record["questions"])])
        found.append(Rows(f"{batch}: the host, ms", ["part", "figure"], host))
    found.append(
        Rows(
            "Machine",
            ["what", "figure"],
            [
                ["processor", f"{result['machine']}, path {result['cpu_path']}"],
                ["threads", str(result["num_threads"])],
                ["reading, GB/s", f"{gigabytes:.1f}"],
                ["products, GFLOP/s", f"{gigaflops:.0f}"],
            ],
        )
    )
    return found


def _stage(name: str, op: dict, gigabytes: float, gigaflops: float) -> list[str]:
    seconds = op["seconds"]
    limit = max(op["bytes"] / gigabytes, op["operations"] / gigaflops) / 1e9
    return [
        name,
        str(op["calls"]),
        f"{seconds * 1e3:.3f}",
        f"{op['bytes'] / 1e6:.2f}",
        f"{op['bytes'] / seconds / 1e9:.1f}",
        f"{op['operations'] / seconds / 1e9:.0f}",
        f"{limit * 1e3:.3f}",
        f"{limit / seconds:.0%}",
    ]


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    words = sys.argv[1:] if arguments is None else arguments
    result = {
        "command": shlex.join(["python", "-m", "bench.step_profile", *words]),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        **profile(options),
    }
    for rows in tables(result):
        print_rows(rows, Console())
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n")
        lines = ["# A decode step, stage by stage", "", f"`{result['command']}`, {result['date']}"]
        for rows in tables(result):
            lines += ["", *markdown_rows(rows)]
        options.output.with_suffix(".md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
