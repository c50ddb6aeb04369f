"""The engine's side of a comparison: one process, one engine, a line of JSON for each request.

Needs the standard library only, so that it runs beside any engine in any virtual environment. What
the engine prints goes to standard error; standard output carries the answers.

Requests: {"do": "load", "model": ..., "dtype": ..., "num_threads": ..., "kv_tokens": ...,
"quantization": ...}, {"do": "run", "prompts": [[...]], "max_new_tokens": ...}, {"do": "quit"}.
Every answer is an object; one with the key "error" says what went wrong.
"""

import json
import os
import re
import resource
import sys
import time
import traceback
from pathlib import Path
from typing import Protocol

#: The first prompt, whose first token ends the start-up.
_FIRST_PROMPT = list(range(1, 17))


class BenchEngine(Protocol):
    """What a file in `bench/peers/` provides.

    Made with `model` (a folder), `dtype` ("bfloat16", ...), `num_threads`, `kv_tokens` (how many
    tokens the largest workload keeps at once) and `quantization` (None or "int8"). `about` is a
    dict for the report: the engine's version, and the settings that were chosen because they are
    its best.
    """

    about: dict[str, str]

    def generate(self, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
        """The new tokens of each prompt: greedy, end tokens ignored, all prompts in one batch."""


def common_prefix(prompts: list[list[int]]) -> int:
    """How many tokens all prompts begin with: all of them where there is one prompt."""
    for index, column in enumerate(zip(*prompts, strict=False)):
        if len(set(column)) > 1:
            return index
    return min(map(len, prompts))


def serve(make_engine) -> None:
    """Answers requests until "quit" or until the other side is gone.

    Args:
        make_engine: a class as `BenchEngine` describes it.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(fields: dict) -> None:
        print(json.dumps(fields), file=answers, flush=True)

    answer({"memory_after_imports": _peak_memory()})
    engine = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            match request.pop("do"):
                case "load":
                    start = time.perf_counter()
                    engine = make_engine(**request)
                    engine.generate([_FIRST_PROMPT], 1)
                    answer({"seconds": time.perf_counter() - start, "about": engine.about})
                case "run":
                    start = time.perf_counter()
                    token_ids = engine.generate(**request)
                    seconds = time.perf_counter() - start
                    answer({"seconds": seconds, "token_ids": token_ids})
                case "quit":
                    answer({"peak_memory": _peak_memory()})
                    return
        except Exception:
            answer({"error": traceback.format_exc()})


def _peak_memory() -> int:
    """The most bytes that this process has held in memory at once."""
    status = Path("/proc/self/status")
    if status.exists():
        # Linux counts what the parent held before it started this program into `ru_maxrss`.
        return int(re.search(r"VmHWM:\s*(\d+) kB", status.read_text())[1]) * 1024
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes * (1 if sys.platform == "darwin" else 1024)
