"""Measures models on a GPU beside transformers: `python -m bench.cuda_decode`.

For each model the time of a decode step (batch 1 at contexts of 128 and 1k tokens, batch 64 at 1k),
of a prefill of 8k tokens, of the start, and what the GPU does in a step. Random weights and
prompts, greedy, end tokens ignored. The limits of the machine (read bandwidth, matrix rate) are
measured in the same run, and times are shown as shares of what they allow.

Each contestant lives in a process of its own. Those that compile do so side by side; then each is
measured while the others wait. `sglite` may run several times, with other arguments of `LLM`:

    --variant batch_invariant='{"batch_invariant": true}' --variant int8='{"quantization": "int8"}'
"""

import argparse
import contextlib
import json
import shlex
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console

from bench.cuda_process import ContestantError, ContestantProcess
from bench.cuda_report import markdown, print_tables
from bench.cuda_workloads import DECODES
from bench.models import checkpoint_folder, default_cache_folder

MODELS = ["llama-3.2-1b", "llama-3.1-8b", "qwen3-0.6b"]
PEERS = ["transformers_static", "transformers_continuous"]
_ROOT = Path(__file__).resolve().parents[1]
# A compiled peer is measured at one context only, since it compiles every shape anew.
_COMPILED_BATCH_1 = {"llama-3.1-8b": DECODES[1].name, "": DECODES[0].name}


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", action="append", help=f"(default: {', '.join(MODELS)})")
    parser.add_argument("--peer", action="append", choices=PEERS, default=[])
    parser.add_argument(
        "--variant",
        action="append",
        default=[],
        type=_variant,
        metavar="NAME=JSON",
        help="a further run of sglite with these arguments of LLM",
    )
    parser.add_argument("--peers-only", action="store_true", help="without this library")
    parser.add_argument(
        "--compile-batch-64",
        action="store_true",
        help="transformers' static cache at batch 64 too, which takes it another minute to compile",
    )
    parser.add_argument("--prepare-seconds", type=float, default=150, help="a peer may compile")
    parser.add_argument("--measure-seconds", type=float, default=60, help="for each contestant")
    parser.add_argument("--cache-folder", type=Path, default=default_cache_folder())
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: a trial")
    parser.add_argument("--scale", type=int, default=1, help="divides all sizes, for a trial")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="tables go to FILE.md")
    return parser.parse_args(arguments)


def _variant(text: str) -> tuple[str, dict]:
    name, _, arguments = text.partition("=")
    return name, json.loads(arguments)


def run(options: argparse.Namespace, about: dict, say, save) -> dict:
    """Measures everything that the options ask for; gives all of it, ready for JSON.

    Args:
        options: of the command.
        about: what the result begins with.
        say: is told what is happening.
        save: is handed the result as far as it has come, after each stage.
    """
    result = {**about, **_about(options.device), "models": {}}
    folders = {}
    for model in options.model or MODELS:
        start = time.monotonic()
        folders[model] = checkpoint_folder(model, options.cache_folder)
        say(f"{model}: checkpoint after {time.monotonic() - start:.1f} s")
        result["models"][model] = {"shape": _shape(folders[model], options.scale), "runs": {}}
    variants = [] if options.peers_only else [("sglite", {}), *options.variant]
    for variant, arguments in variants:
        for model, folder in folders.items():
            runs = result["models"][model]["runs"]
            _run_side_by_side(
                "sglite",
                {variant: (folder, runs)},
                options,
                say,
                settings={"arguments": arguments},
            )
            save(result)
    for peer in options.peer:
        stages = {
            model: (folder, result["models"][model]["runs"]) for model, folder in folders.items()
        }
        _run_side_by_side(peer, stages, options, say)
        save(result)
    return result


def _run_side_by_side(name: str, stages: dict, options, say, settings: dict | None = None) -> None:
    """Prepares one contestant on several models at once, then measures one after the other.

    Args:
        name: the contestant.
        stages: by label (a model, or a variant of ours) the checkpoint and where the result goes.
        options: of the command.
        say: is told what is happening.
        settings: of the contestant.
    """
    with contextlib.ExitStack() as stack:
        started = {}
        for label, (folder, _) in stages.items():
            decodes = None
            if name == "transformers_static":
                decodes = [_COMPILED_BATCH_1.get(label, _COMPILED_BATCH_1[""])]
                decodes += [DECODES[2].name] * options.compile_batch_64
            process = ContestantProcess(
                name,
                folder,
                device=options.device,
                scale=options.scale,
                decodes=decodes,
                settings=settings,
            )
            started[label] = stack.enter_context(process)
        until = time.monotonic() + options.prepare_seconds
        ready, failed = {}, {}
        for label, process in started.items():
            try:
                ready[label] = process.wait_ready(until)
            except ContestantError as error:
                failed[label] = str(error)
        for label, (_, runs) in stages.items():
            key = label if name == "sglite" else name
            if label in ready:
                try:
                    measured = started[label].measure(options.measure_seconds)
                    runs[key] = {**ready[label], **measured}
                except ContestantError as error:
                    failed[label] = str(error)
            if label in failed:
                runs[key] = {"error": failed[label]}
            say(f"{name}, {label}: {'failed' if label in failed else 'measured'}")


def _about(device: str) -> dict:
    """The machine and its limits, measured in a process that ends before a contestant starts."""
    if device == "cpu":
        return {
            "machine": {"gpu": "none: a trial on the CPU"},
            "limits": {"read_gigabytes_per_second": 30, "matmul_teraflops_per_second": 0.4},
        }
    code = (
        "import json; from bench.cuda_limits import cuda_limits; "
        "from bench.cuda_machine import cuda_machine; "
        "print(json.dumps({'machine': cuda_machine(), 'limits': cuda_limits()}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=_ROOT, check=True, stdout=-1)
    return json.loads(done.stdout)


def _shape(folder: Path, scale: int) -> dict:
    """What the report needs of a model, so that it can be made again from the JSON alone."""
    from bench.cuda_contestants.serve import scaled
    from bench.cuda_workloads import ModelShape

    shape = ModelShape.of(folder)
    decodes, prefill = scaled(scale)
    return {
        "weight_bytes": shape.weight_bytes,
        "kv_bytes_per_token": shape.kv_bytes_per_token,
        "least_terms": {work.name: work.least_terms(shape) for work in (*decodes, prefill)},
        "batch": {decode.name: decode.batch for decode in decodes},
        "prefill": prefill.name,
    }


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    progress = Console(stderr=True)
    words = sys.argv[1:] if arguments is None else arguments
    about = {
        "command": shlex.join(["python", "-m", "bench.cuda_decode", *words]),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }

    def say(text: str) -> None:
        progress.print(text, style="dim", highlight=False)

    def save(result: dict) -> None:
        if options.output:
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.write_text(json.dumps(result, indent=1) + "\n")
            options.output.with_suffix(".md").write_text(markdown(result))

    print_tables(run(options, about, say, save), Console(width=150))


if __name__ == "__main__":
    main()
