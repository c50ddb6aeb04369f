"""Tables from what `bench.cuda_decode` measured: for a terminal and for a file."""

from statistics import median

from rich.console import Console

from bench.cuda_workloads import least_seconds
from bench.report import Rows, markdown_rows, print_rows

_SHOWN_KERNELS = 24
_NAME_WIDTH = 70


def tables(result: dict) -> list[Rows]:
    """Machine; then for each model times, start-up, and the GPU's work in a step."""
    made = [_machine_table(result)]
    for model, record in result["models"].items():
        made.append(_times_table(model, record, result["limits"]))
        if "sglite" in record["runs"] and "error" not in record["runs"]["sglite"]:
            made += [_startup_table(model, record), _gaps_table(model, record)]
            made += _kernel_tables(model, record)
    return made


def print_tables(result: dict, console: Console) -> None:
    """Prints `tables` to a terminal, and why a contestant failed."""
    for rows in tables(result):
        print_rows(rows, console)
    for model, name, error in _failures(result):
        console.print(f"{name} failed on {model}:\n{error}", markup=False, highlight=False)


def markdown(result: dict) -> str:
    """`tables` and the command that made them, as a page."""
    lines = [f"# Models on {result['machine']['gpu']}", ""]
    lines += [f"`{result['command']}`, {result['date']}", ""]
    for rows in tables(result):
        lines += markdown_rows(rows)
    for model, name, error in _failures(result):
        lines += [f"{name} failed on {model}: `{error.strip().splitlines()[-1]}`", ""]
    lines += [
        "Times are medians. The limit is what reading the weights once and the KV cache, or the "
        "matrix products if that is longer, take at the read bandwidth and the matrix rate found "
        "in the same run. The context is the mean over the measured tokens. Kernels and gaps are "
        "the profiler's: a kernel that starts early waits within its time, and what it adds to "
        "the step is the time from the end of all before it to its own.",
        "",
    ]
    return "\n".join(lines)


def _failures(result: dict):
    for model, record in result["models"].items():
        for name, run in record["runs"].items():
            if "error" in run:
                yield model, name, run["error"]


def _machine_table(result: dict) -> Rows:
    cells = [[name.replace("_", " "), f"{value}"] for name, value in result["machine"].items()]
    cells += [[name.replace("_", " "), f"{value:.4g}"] for name, value in result["limits"].items()]
    return Rows("Machine", ["what", "figure"], cells)


def _times_table(model: str, record: dict, limits: dict) -> Rows:
    """One row for each workload; for each run its time and its share of the limit."""
    runs = {name: run for name, run in record["runs"].items() if "error" not in run}
    columns = ["workload", "limit, ms"]
    for name in runs:
        columns += [f"{name}, ms", "of the limit"]
    cells = []
    for workload, terms in record["shape"]["least_terms"].items():
        least = least_seconds(terms, limits)
        row = [workload, f"{least * 1e3:.3f}"]
        for run in runs.values():
            seconds = _seconds(run, workload, record["shape"]["prefill"])
            row += [f"{seconds * 1e3:.3f}", f"{least / seconds:.0%}"] if seconds else ["", ""]
        cells.append(row)
    return Rows(f"{model}: time of a step", columns, cells)


def _seconds(run: dict, workload: str, prefill: str) -> float | None:
    if workload == prefill:
        return median(run["prefill_seconds"]) if run.get("prefill_seconds") else None
    measured = run["decode"].get(workload)
    return median(measured["step_seconds"]) if measured and measured["step_seconds"] else None


def _startup_table(model: str, record: dict) -> Rows:
    cells = []
    for name, run in record["runs"].items():
        if "startup" in run:
            cells.append([name, *(f"{seconds:.2f}" for seconds in run["startup"].values())])
    columns = ["run", "reading weights, s", "then until ready, s", "first 8 tokens, s"]
    return Rows(f"{model}: start-up", columns, cells)


def _gaps_table(model: str, record: dict) -> Rows:
    cells = []
    for name, run in record["runs"].items():
        for workload, measured in run.get("decode", {}).items():
            trace = measured.get("trace") or {}
            if "period_us" not in trace:
                continue
            mean = measured["mean_step_seconds"]
            cells.append(
                [
                    f"{name}, {workload}",
                    f"{median(measured['step_seconds']) * 1e3:.3f}",
                    f"{mean * 1e3:.3f}",
                    *(f"{trace[key]:.1f}" for key in ("period_us", "gap_us", "idle_us")),
                    f"{trace['max_idle_us']:.1f}",
                ]
            )
    columns = ["run", "streamed, ms", "generate, ms", "profiled, us", "gap, us", "idle, us", "most"]
    return Rows(f"{model}: between steps", columns, cells)


def _kernel_tables(model: str, record: dict) -> list[Rows]:
    made = []
    for workload, measured in record["runs"]["sglite"]["decode"].items():
        kernels = (measured.get("trace") or {}).get("kernels", [])
        cells = [
            [
                kernel["name"][:_NAME_WIDTH].replace("|", "/"),
                f"{kernel['per_step']:g}",
                f"{kernel['mean_us']:.2f}",
                f"{kernel['added_us']:.1f}",
            ]
            for kernel in kernels[:_SHOWN_KERNELS]
        ]
        if cells:
            columns = ["kernel", "in a step", "mean, us", "adds to the step, us"]
            made.append(Rows(f"{model}, {workload}: kernels", columns, cells))
    return made
