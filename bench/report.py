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
    found = [_workload_table(result), _engine_table(result), machine_rows(result)]
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
        "the weights once a step, and the matrix products, take at what the machine gave in the "
        "same turn, right before the first workload; the share is the median of the turns', and "
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
    for name in result["workloads"]:
        mine = rates(result, name, ours)
        row = [name, spread(mine)]
        for peer in peers:
            theirs = rates(result, name, peer)
            in_turn = [a / b for a, b in zip(mine, theirs, strict=True)]
            row += [spread(theirs), bracket(median(mine) / median(theirs), in_turn, 2)]
        share = reached_share(result, name)
        cells.append([*row, f"{median(mine) / share:.0f}", f"{share:.0%}"])
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
                spread(record["import_seconds"], 2),
                spread(record["startup_seconds"], 2),
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


def machine_rows(result: dict) -> Rows:
    """What was measured of the machine, and what else ran on it."""
    read = [limits["read_gigabytes_per_second"] for limits in result["limits"]]
    multiply = [limits["matmul_gigaflops_per_second"] for limits in result["limits"]]
    machine = result["machine"]
    cells = [
        ["processor", machine["processor"]],
        ["system", f"{machine['system']}, Python {result['python']}"],
        ["threads", f"{result['num_threads']}"],
        ["load average at the start", f"{result['load_average']:.1f}"],
        ["reading, GB/s", spread(read)],
        ["matrix product, GFLOP/s", spread(multiply, 0)],
    ]
    return Rows("Machine", ["what", "figure"], cells)


def rates(result: dict, workload: str, engine: str) -> list[float]:
    """tok/s of one engine in every turn of a workload."""
    counted = _workload(result, workload).counted_tokens
    return [counted / seconds for seconds in result["workloads"][workload]["seconds"][engine]]


def reached_share(result: dict, workload: str) -> float:
    """Our tok/s over what the machine's limits allow: the median of the turns.

    Each turn is held against its own limits, since they move as much as the engines do.
    """
    least = [
        least_seconds(
            _workload(result, workload),
            Weights(**result["weights"]),
            weights_of(result),
            limits["read_gigabytes_per_second"],
            limits["matmul_gigaflops_per_second"],
        )
        for limits in result["limits"]
    ]
    ours = result["workloads"][workload]["seconds"][next(iter(result["engines"]))]
    return median(a / b for a, b in zip(least, ours, strict=True))


def _workload(result: dict, name: str) -> Workload:
    record = result["workloads"][name]
    return Workload(**{field.name: record[field.name] for field in fields(Workload)})


def _last_words(text: str) -> str:
    """The last line of what a failed engine said, after what it was doing."""
    doing, said = text.split(": ", 1)
    return f"{doing}: {said.strip().splitlines()[-1]}"


def weights_of(result: dict) -> str:
    """How the weights were stored: "bfloat16", "int8"."""
    return result["quantization"] or result["dtype"]


def spread(values: list[float], digits: int = 1) -> str:
    """The median, and in brackets the least and the greatest."""
    return bracket(median(values), values, digits)


def bracket(middle: float, values: list[float], digits: int) -> str:
    """`middle`, and in brackets the least and the greatest of `values`."""
    return f"{middle:.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"
