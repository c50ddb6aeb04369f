"""The command line, for a first try and for bug reports: generate, chat, config."""

import argparse
import ast
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from sglite.interface.errors import SGLiteError
from sglite.llm import LLM
from sglite.tools.show_config import show_config


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0, 1 for an error of sglite, 130 for Ctrl-C."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except SGLiteError as error:
        print(f"sglite: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


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

    config = commands.add_parser("config", help="print versions and what was built in")
    config.set_defaults(run=lambda options: show_config())
    return parser


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
            conversations = [[{"role": "user", "content": prompt}] for prompt in prompts]
            outputs = llm.chat(conversations, **parameters)
        else:
            outputs = llm.generate(prompts, **parameters)
    for output in outputs:
        print(output.text)


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
