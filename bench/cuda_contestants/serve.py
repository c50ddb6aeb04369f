"""The contestant's side: prepares, says so, and measures when it is told to.

Each writes three lines of JSON: {"ready": ...}, the answer, and what {"error": ...} there was
instead of either. Between them it waits, so that nobody compiles while somebody else is measured.
What the contestant prints goes to standard error.
"""

import argparse
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from bench.cuda_workloads import DECODES, PREFILL, Decode, Prefill


class Contestant(Protocol):
    """Made with the checkpoint's folder, the device, the workloads and further settings."""

    def prepare(self) -> dict:
        """Does all that is done once, as compiling; gives what it has to say about itself."""

    def measure(self) -> dict:
        """{"decode": {name: {"step_seconds": [...], ...}}, "prefill_seconds": [...]}."""


def serve(make: Callable[..., Contestant]) -> None:
    """Runs one contestant; `make` takes the folder, the device, decodes, prefill and settings."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--scale", type=int, default=1)
    parser.add_argument("--decodes", type=json.loads, default=None)
    parser.add_argument("--settings", type=json.loads, default={})
    options = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(fields: dict) -> None:
        print(json.dumps(fields), file=answers, flush=True)

    decodes, prefill = scaled(options.scale, options.decodes)
    try:
        contestant = make(options.folder, options.device, decodes, prefill, **options.settings)
        answer({"ready": contestant.prepare()})
        if sys.stdin.readline():
            answer(contestant.measure())
    except Exception:
        answer({"error": traceback.format_exc()[-4000:]})


def scaled(scale: int, names: Sequence[str] | None = None) -> tuple[list[Decode], Prefill]:
    """The workloads with all sizes divided, for a trial on a machine without a GPU."""
    decodes = [
        Decode(
            decode.name,
            max(1, decode.batch // scale),
            max(32, decode.context // scale),
            max(8, decode.new_tokens // scale),
        )
        for decode in DECODES
        if names is None or decode.name in names
    ]
    return decodes, Prefill(PREFILL.name, PREFILL.tokens // scale)
