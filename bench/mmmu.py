"""Measures a vision-language model on MMMU: `python bench/mmmu.py --model PATH --data DIR`.

DIR is a copy of the hub's MMMU/MMMU (a folder per subject), or of one setting of MMMU/MMMU_Pro,
such as "MMMU_Pro/standard (10 options)" or "MMMU_Pro/vision". Nothing is downloaded. With
`--engine both` sglite and Hugging Face transformers answer the same questions, and are compared
one by one: the share of equal answers, McNemar's test, and how many times as fast the first is.
Where a prompt had another number of tokens with one than with the other, the run ends in an error.

Each engine first answers some questions one at a time, for the time to the first token, and is
loaded anew for all of them together, so that nothing is left in a cache.
"""

import argparse
import io
import json
import shlex
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import torch
from PIL import Image
from rich.console import Console
from tqdm import tqdm

# A script's own folder is on the path, and not the one that holds the package `bench`.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.machine import processor
from bench.mmmu_engines import ENGINES
from bench.mmmu_prompts import Prompt, make_prompt
from bench.mmmu_questions import SPLITS, DataError, read_questions
from bench.mmmu_report import DifferentPromptsError, Run, check_same_prompts, summarise, tables
from bench.report import markdown_rows, print_rows
from sglite.models.checkpoint import resolve_checkpoint


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help='a folder, or "demo-vl"')
    parser.add_argument("--data", type=Path, required=True, help="the folder with the questions")
    parser.add_argument("--engine", choices=[*ENGINES, "both"], default="sglite")
    parser.add_argument("--split", choices=SPLITS, help="default: validation, else test")
    parser.add_argument("--subject", action="append", help="only this; may be given again")
    parser.add_argument("--limit", type=_positive, help="only so many questions, evenly chosen")
    parser.add_argument(
        "--dtype", default="auto", choices=["auto", "bfloat16", "float16", "float32"]
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--max-new-tokens", type=_positive, default=128)
    parser.add_argument("--first-tokens", type=_positive, default=32, help="prompts timed alone")
    parser.add_argument(
        "--batch-size", type=_positive, default=8, help="of Hugging Face; sglite makes its own"
    )
    parser.add_argument("--num-threads", type=_positive, help="of the CPU")
    parser.add_argument(
        "--output", type=Path, metavar="FILE.json", help="also written as tables to FILE.md"
    )
    return parser.parse_args(arguments)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return value


def evenly(items: list, count: int) -> list:
    """So many of the items, at equal distances; all of them where there are no more."""
    count = min(count, len(items))
    return [items[index * len(items) // count] for index in range(count)]


def _warm_up_prompt() -> Prompt:
    """With a picture that no question has, since engines may keep what they have seen."""
    file = io.BytesIO()
    Image.new("RGB", (112, 112), (123, 45, 67)).save(file, "PNG")
    return [file.getvalue(), "warm-up"]


def run_engine(name: str, prompts: list[Prompt], options: argparse.Namespace) -> Run:
    """Loads an engine, times first tokens, loads it again and asks everything."""
    arguments = (
        str(resolve_checkpoint(options.model).folder),
        options.dtype,
        options.device,
        options.batch_size,
    )
    engine = ENGINES[name](*arguments)
    alone = evenly(prompts, options.first_tokens)
    engine.first_token_seconds(_warm_up_prompt())
    first = [engine.first_token_seconds(prompt) for prompt in alone]
    engine.close()
    engine = ENGINES[name](*arguments)
    start = time.perf_counter()
    answers = engine.answer(prompts, options.max_new_tokens)
    # A bar where someone is watching.
    replies = list(tqdm(answers, desc=name, total=len(prompts), unit="question", disable=None))
    seconds = time.perf_counter() - start
    engine.close()
    return Run(name, engine.about, replies, seconds, first)


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    console = Console()
    if options.num_threads:
        torch.set_num_threads(options.num_threads)
    try:
        questions = read_questions(options.data, options.split, options.subject)
    except DataError as error:
        raise SystemExit(str(error)) from None
    if options.limit:
        questions = evenly(questions, options.limit)
    prompts = [make_prompt(question) for question in questions]
    names = list(ENGINES) if options.engine == "both" else [options.engine]
    runs = [run_engine(name, prompts, options) for name in names]
    words = sys.argv[1:] if arguments is None else arguments
    result = {
        "model": Path(options.model).name,
        "command": shlex.join(["python", "bench/mmmu.py", *words]),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": _machine(options.device),
        **summarise(questions, runs),
    }
    heading = (
        f"{result['model']}, {result['setting']}: {result['questions']} questions, "
        f"{result['images']} pictures"
    )
    console.print(heading, style="bold", highlight=False)
    for rows in tables(result):
        print_rows(rows, console)
    if hidden := result["engines"][runs[0].engine]["accuracy"]["overall"]["hidden"]:
        console.print(f"{hidden} questions have no answer in the data, and are not scored")
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(result, indent=1) + "\n")
        lines = [f"# {heading}", "", f"`{result['command']}`, {result['machine']}", ""]
        lines += [line for rows in tables(result) for line in markdown_rows(rows)]
        options.output.with_suffix(".md").write_text("\n".join(lines).rstrip() + "\n")
    if len(runs) == 2:
        try:
            check_same_prompts(questions, runs)
        except DifferentPromptsError as error:  # last, as hours may lie in what was answered
            raise SystemExit(f"NO COMPARISON: {error}") from None


def _machine(device: str) -> str:
    if device != "cpu" and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{processor()}, {torch.get_num_threads()} threads"


if __name__ == "__main__":
    main()
