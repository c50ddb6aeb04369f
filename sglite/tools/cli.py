"""The command line, for a first try and bug reports: generate, chat, compare, eval, pack, ..."""

import argparse
import ast
import json
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from sglite.interface.errors import InvalidRequestError, SGLiteError
from sglite.llm import LLM
from sglite.tools.pack import pack
from sglite.tools.show_config import show_config

_PLACE = "<image>"  # of a picture in a prompt, with every model


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status.

    0; 1 for an error of sglite, or a model that `compare` finds wrong; 130 for Ctrl-C.
    """
    parser = _parser()
    options, others = parser.parse_known_args(arguments)
    if others and options.run is not _evaluate:
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    options.others = others
    try:
        return options.run(options) or 0
    except SGLiteError as error:
        print(f"sglite: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sglite", description="Run a language model in this process."
    )
    commands = parser.add_subparsers(required=True, metavar="command")

    generate = commands.add_parser("generate", help="generate text from prompts")
    generate.add_argument("prompts", nargs="*", help="prompts; read from standard input if absent")
    generate.add_argument(
        "--chat", action="store_true", help="put each prompt into the model's chat template"
    )
    generate.add_argument(
        "--image",
        action="append",
        dest="images",
        default=[],
        metavar="FILE",
        help="a picture for each prompt, in place of its <image>, or before the text; may be "
        "repeated",
    )
    generate.set_defaults(run=_generate)

    chat = commands.add_parser("chat", help="talk to a model")
    chat.add_argument("--system", help="a system message to begin with")
    chat.set_defaults(run=_chat)

    for command in (generate, chat):
        command.add_argument(
            "--model", default="demo", help='a folder, a hub id or "demo" (the default)'
        )
        command.add_argument(
            "--llm",
            action="append",
            default=[],
            metavar="NAME=VALUE",
            help="an argument of LLM(...), such as --llm dtype=float32; may be repeated",
        )
        command.add_argument(
            "--set",
            action="append",
            default=[],
            metavar="NAME=VALUE",
            help="a sampling parameter, such as --set temperature=0; may be repeated",
        )

    _add_compare(commands)
    _add_eval(commands)
    _add_pack(commands)

    config = commands.add_parser("config", help="print versions and what was built in")
    config.set_defaults(run=lambda options: show_config())
    return parser


def _add_compare(commands: Any) -> None:
    compare = commands.add_parser(
        "compare", help="check a model against Hugging Face, and find where it first goes wrong"
    )
    compare.add_argument("model", help='a folder, a hub id or "demo"')
    compare.add_argument(
        "--prompt",
        action="append",
        dest="prompts",
        metavar="TEXT",
        help="a prompt instead of the built-in ones; may be repeated",
    )
    compare.add_argument(
        "--new-tokens", type=int, default=16, help="decoded after each prompt (16)"
    )
    compare.add_argument(
        "--architecture", help='a registered class instead of config.json\'s, or "transformers"'
    )
    compare.add_argument("--dtype", default="auto", help="float32, bfloat16 or float16")
    compare.add_argument(
        "--quantization", help="int8 or int4: measure what quantising loses as well"
    )
    compare.add_argument(
        "--no-self", action="store_true", help="do not compare sglite with itself as well"
    )
    compare.add_argument("--json", action="store_true", help="print the report as JSON")
    compare.add_argument(
        "--llm",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an argument of LLM(...), such as --llm device=cpu; may be repeated",
    )
    compare.set_defaults(run=_compare)


def _add_eval(commands: Any) -> None:
    evaluate = commands.add_parser(
        "eval",
        help="evaluate a model on GSM8K, MMLU, ... through lm-evaluation-harness",
        usage="python -m sglite eval --tasks TASK [--model MODEL] [--llm NAME=VALUE] [...]",
        epilog="All other arguments go to `lm-eval run`, which lists them under --help: "
        "--num_fewshot, --limit, --apply_chat_template, --output_path, --include_path, ...",
        allow_abbrev=False,  # --mode is the harness's to judge
    )
    evaluate.add_argument(
        "--model", default="demo", help='a folder, a hub id or "demo" (the default)'
    )
    evaluate.add_argument(
        "--llm",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an argument of LLM(...), such as --llm dtype=float32; may be repeated",
    )
    evaluate.set_defaults(run=_evaluate)


def _add_pack(commands: Any) -> None:
    pack = commands.add_parser(
        "pack", help="write a checkpoint that starts at once on a CPU, whatever its size"
    )
    pack.add_argument("model", help='a folder, a hub id or "demo"')
    pack.add_argument("folder", help="to be made")
    pack.add_argument("--dtype", default="auto", help="float32, bfloat16 or float16")
    pack.add_argument("--quantization", help="int8 or int4: quantise the weights as well")
    pack.add_argument("--architecture", help="a registered class instead of config.json's")
    pack.set_defaults(run=_pack)


def _settings(pairs: Sequence[str], option: str) -> dict[str, Any]:
    """NAME=VALUE pairs as a dict; a value that is no Python literal is taken as a string."""
    settings = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise SystemExit(f"python -m sglite: {option} {pair}: expected NAME=VALUE")
        try:
            settings[name] = ast.literal_eval(value)
        except (SyntaxError, ValueError):
            settings[name] = value
    return settings


def _load(options: argparse.Namespace) -> LLM:
    return LLM(options.model, **_settings(options.llm, "--llm"))


def _generate(options: argparse.Namespace) -> None:
    prompts = options.prompts or [line for line in sys.stdin.read().splitlines() if line.strip()]
    parameters = _settings(options.set, "--set")
    with _load(options) as llm:
        if options.chat:
            conversations = [
                [{"role": "user", "content": _parts(prompt, options.images)}] for prompt in prompts
            ]
            outputs = llm.chat(conversations, **parameters)
        elif options.images:
            texts = [_with_places(prompt, len(options.images)) for prompt in prompts]
            outputs = llm.generate(texts, images=[options.images] * len(texts), **parameters)
        else:
            outputs = llm.generate(prompts, **parameters)
    for output in outputs:
        print(output.text)


def _with_places(prompt: str, num_images: int) -> str:
    """The prompt, with a place for each picture in front where it has none."""
    return prompt if _PLACE in prompt else _PLACE * num_images + prompt


def _parts(prompt: str, images: Sequence[str]) -> str | list[dict[str, str]]:
    """The content of a message with pictures where `<image>` stands, or in front."""
    if not images:
        return prompt
    texts = _with_places(prompt, len(images)).split(_PLACE)
    if len(texts) - 1 != len(images):
        raise InvalidRequestError(
            f"the prompt has {len(texts) - 1} times {_PLACE}, and --image is given {len(images)} "
            f"times"
        )
    parts = [{"type": "text", "text": texts[0]}]
    for image, text in zip(images, texts[1:], strict=True):
        parts += [{"type": "image", "image": image}, {"type": "text", "text": text}]
    return [part for part in parts if part.get("text") != ""]


def _compare(options: argparse.Namespace) -> int:
    from sglite.tools.compare import compare

    arguments = {"architecture": options.architecture, "dtype": options.dtype}
    report = compare(
        options.model,
        prompts=options.prompts,
        new_tokens=options.new_tokens,
        itself=not options.no_self,
        quantization=options.quantization,
        **{**arguments, **_settings(options.llm, "--llm")},
    )
    if options.json:
        print(json.dumps(report.to_dict(), indent=1, allow_nan=False))
    else:
        Console().print(report)
    # One line of its own, which stays whole however narrow the terminal is.
    print(report.verdict, file=sys.stderr if options.json else sys.stdout)
    return 0 if report.passed else 1


def _pack(options: argparse.Namespace) -> None:
    folder = pack(
        options.model,
        options.folder,
        dtype=options.dtype,
        quantization=options.quantization,
        architecture=options.architecture,
    )
    print(f'{folder} is ready: LLM("{folder}")')


def _evaluate(options: argparse.Namespace) -> None:
    from sglite.tools.evaluations.command import run_harness

    run_harness(options.model, _settings(options.llm, "--llm"), options.others)


def _chat(options: argparse.Namespace) -> None:
    console = Console()
    messages: list[dict[str, str]] = []
    if options.system:
        messages.append({"role": "system", "content": options.system})
    parameters = _settings(options.set, "--set")
    with _load(options) as llm:
        console.print(
            f"{options.model}; an empty line or Ctrl-D ends the conversation", style="dim"
        )
        while question := _ask(console):
            messages.append({"role": "user", "content": question})
            answer = ""
            for chunk in llm.stream_chat(messages, **parameters):
                answer += chunk.text
                console.print(chunk.text, end="", markup=False, highlight=False)
            console.print()
            messages.append({"role": "assistant", "content": answer})


def _ask(console: Console) -> str:
    try:
        return console.input("[bold]> [/bold]").strip()
    except EOFError:
        return ""
