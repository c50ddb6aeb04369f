"""Tables from what `bench.comparison.compare` measured: for a terminal and for a file."""

from dataclasses import dataclass, fields
from statistics import median

from rich.console import Console
from rich.table import Table

from bench.roofline import Weights, least_seconds
from bench.workloads import Workload


@dataclass(frozen=True)
class Rows:
    """A table: its title, the names of its columns and its cells."""

    title: str
    columns: list[str]
    cells: list[list[str]]


def print_rows(rows: Rows, console: Console) -> None:
    """Prints one table to a terminal, its first column to the left."""
    table = Table(title=rows.title, title_justify="left")
    for index, column in enumerate(rows.columns):
        table.add_column(column, justify="right" if index else "left")
    for cells in rows.cells:
        table.add_row(*cells)
    console.print(table)


def markdown_rows(rows: Rows) -> list[str]:
    """One table as the lines of a page, under a heading."""
    return [
        f"## {rows.title}",
        "",
        "| " + " | ".join(rows.columns) + " |",
        "|" + "|".join(["---", *["---:"] * (len(rows.columns) - 1)]) + "|",
        *("| " + " | ".join(cells) + " |" for cells in rows.cells),
        "",
    ]


def tables(result: dict) -> list[Rows]:
    """What was measured, as tables: workloads, engines, the machine, and engines that failed.

    The first engine is ours; ratios are its tok/s over a peer's. A figure is the median of the
    repeats, and in brackets stand the least and the greatest. A ratio's bracket holds those of
    single turns, in each of which the engines ran directly one after the other.
    """
    found = [_workload_table(result), _engine_table(result), _machine_table(result)]
    if result["failures"]:
        cells = [[name, _last_words(words)] for name, words in result["failures"].items()]
        found.append(Rows("Left out", ["engine", "why"], cells))
    return found


def print_tables(result: dict, console: Console) -> None:
    """Prints `tables` to a terminal."""
    console.print(f"{result['model']}, {weights_of(result)}", style="bold")
    for rows in tables(result):
        print_rows(rows, console)


def markdown(result: dict) -> str:
    """`tables` and the command that made them, as a page."""
    lines = [f"# Throughput: {result['model']}, {weights_of(result)}", ""]
    lines += [f"`{result['command']}`, {result['date']}", ""]
    for rows in tables(result):
        lines += markdown_rows(rows)
    lines += [
        "Figures are medians, with the least and the greatest in brackets. A ratio is our tok/s "
        "over the peer's, and its bracket holds those of single turns. The limit is what reading "
        "the weights once a step, and the matrix products, take at the machine's best figures; "
        "attention is left out of it. First tokens are the same where engines agree on the most "
        "probable next token.",
        "",
    ]
    return "\n".join(lines)


def _workload_table(result: dict) -> Rows:
    ours, *peers = result["engines"]
    columns = ["workload", f"{ours}, tok/s"]
    for peer in peers:
        columns += [f"{peer}, tok/s", f"{ours} / {peer}"]
    columns += ["limit, tok/s", "reached"]
    cells = []
    for name, record in result["workloads"].items():
        workload = Workload(**{field.name: record[field.name] for field in fields(Workload)})
        rates = {
            engine: [workload.counted_tokens / seconds for seconds in record["seconds"][engine]]
            for engine in result["engines"]
        }
        row = [name, _spread(rates[ours])]
        for peer in peers:
            in_turn = [a / b for a, b in zip(rates[ours], rates[peer], strict=True)]
            ratio = median(rates[ours]) / median(rates[peer])
            row += [_spread(rates[peer]), _bracket(ratio, in_turn, 2)]
        limit = workload.counted_tokens / least_seconds(
            workload, Weights(**result["weights"]), weights_of(result), *best_limits(result)
        )
        row += [f"{limit:.0f}", f"{median(rates[ours]) / limit:.0%}"]
        cells.append(row)
    return Rows("Workloads", columns, cells)


def _engine_table(result: dict) -> Rows:
    ours = next(iter(result["engines"]))
    cells = []
    for name, record in result["engines"].items():
        same = total = 0
        for workload in result["workloads"].values():
            pairs = zip(workload["first_tokens"][ours], workload["first_tokens"][name], strict=True)
            agreements = [a == b for a, b in pairs]
            same, total = same + sum(agreements), total + len(agreements)
        peak, imported = record["peak_memory"], record["memory_after_imports"]
        cells.append(
            [
                f"{name} {record['about']['version']}",
                _spread(record["import_seconds"], 2),
                _spread(record["startup_seconds"], 2),
                f"{peak / 1e6:.0f}",
                f"{(peak - imported) / 1e6:.0f}",
                f"{same} of {total}",
                record["about"]["settings"],
            ]
        )
    columns = [
        "engine",
        "imports, s",
        "start-up to first token, s",
        "peak memory, MB",
        "above imports, MB",
        "same first tokens",
        "settings",
    ]
    return Rows("Engines", columns, cells)


def _machine_table(result: dict) -> Rows:
    read = [limits["read_gigabytes_per_second"] for limits in result["limits"]]
    multiply = [limits["matmul_gigaflops_per_second"] for limits in result["limits"]]
    machine = result["machine"]
    cells = [
        ["processor", machine["processor"]],
        ["system", f"{machine['system']}, Python {result['python']}"],
        ["threads", f"{result['num_threads']}"],
        ["load average at the start", f"{result['load_average']:.1f}"],
        ["reading, GB/s", _spread(read)],
        ["matrix product, GFLOP/s", _spread(multiply, 0)],
    ]
    return Rows("Machine", ["what", "figure"], cells)


def best_limits(result: dict) -> tuple[float, float]:
    """GB/s and GFLOP/s, the best of the repeats: other work can only lower them."""
    return tuple(
        max(limits[name] for limits in result["limits"])
        for name in ("read_gigabytes_per_second", "matmul_gigaflops_per_second")
    )


def _last_words(text: str) -> str:
    """The last line of what a failed engine said, after what it was doing."""
    doing, said = text.split(": ", 1)
    return f"{doing}: {said.strip().splitlines()[-1]}"


def weights_of(result: dict) -> str:
    """How the weights were stored: "bfloat16", "int8"."""
    return result["quantization"] or result["dtype"]


def _spread(values: list[float], digits: int = 1) -> str:
    return _bracket(median(values), values, digits)


def _bracket(middle: float, values: list[float], digits: int) -> str:
    return f"{middle:.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"
