"""The driver's side of a comparison: an engine in a process of its own, spoken to in JSON lines."""

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Self

_ROOT = Path(__file__).resolve().parents[1]
_PEERS = _ROOT / "bench" / "peers"


class EngineError(RuntimeError):
    """An engine's process failed; the message holds what it said."""


def engine_names() -> list[str]:
    """The engines that `bench/peers/` has a file for."""
    return sorted(file.stem for file in _PEERS.glob("*.py") if file.stem != "__init__")


class EngineProcess:
    """One engine, alive until `quit` or the end of the `with` block.

    Args:
        name: a file in `bench/peers/`, without `.py`.
        python: the interpreter of the virtual environment that the engine is installed in.
        num_threads: threads the engine may use.

    Attributes:
        import_seconds: from the start of the process until everything was imported.
        memory_after_imports: the most bytes it had held by then.
    """

    def __init__(self, name: str, python: str, num_threads: int):
        self.name = name
        self._resources = contextlib.ExitStack()
        self._errors = self._resources.enter_context(tempfile.TemporaryFile("w+"))  # noqa: SIM115
        paths = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        start = time.perf_counter()
        self._process = subprocess.Popen(
            [python, "-m", f"bench.peers.{name}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(paths),
                "OMP_NUM_THREADS": str(num_threads),
                "HF_HUB_OFFLINE": "1",
            },
            start_new_session=True,  # so that what the engine starts can be ended with it
        )
        self._num_threads = num_threads
        self._resources.callback(self._end)
        with contextlib.ExitStack() as on_failure:
            on_failure.push(self._resources)
            self.memory_after_imports = self._answer()["memory_after_imports"]
            on_failure.pop_all()
        self.import_seconds = time.perf_counter() - start

    def load(
        self, model: Path, dtype: str, kv_tokens: int, quantization: str | None = None
    ) -> dict:
        """Loads the model and generates a first token: {"seconds", "about"}."""
        return self._ask(
            {
                "do": "load",
                "model": str(model),
                "dtype": dtype,
                "num_threads": self._num_threads,
                "kv_tokens": kv_tokens,
                "quantization": quantization,
            }
        )

    def run(self, prompts: list[list[int]], max_new_tokens: int) -> dict:
        """Generates for all prompts at once: {"seconds", "token_ids"}.

        Raises:
            EngineError: the engine failed, or gave another number of tokens.
        """
        answer = self._ask({"do": "run", "prompts": prompts, "max_new_tokens": max_new_tokens})
        lengths = [len(token_ids) for token_ids in answer["token_ids"]]
        if lengths != [max_new_tokens] * len(prompts):
            raise EngineError(
                f"{self.name} was to give {max_new_tokens} tokens for each of {len(prompts)} "
                f"prompts; it gave {lengths}"
            )
        return answer

    def quit(self) -> int:
        """Ends the process; its peak memory in bytes."""
        peak_memory = self._ask({"do": "quit"})["peak_memory"]
        self._process.wait()
        return peak_memory

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._resources.close()

    def _ask(self, request: dict) -> dict:
        with contextlib.suppress(BrokenPipeError):  # the missing answer tells of it
            print(json.dumps(request), file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict:
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            self._errors.seek(0)
            raise EngineError(
                f"{self.name} ended with exit code {code}:\n{self._errors.read()[-4000:]}"
            )
        answer = json.loads(line)
        if "error" in answer:
            raise EngineError(f"{self.name} failed:\n{answer['error']}")
        return answer

    def _end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        with contextlib.suppress(BrokenPipeError):  # a request that nobody reads any more
            self._process.stdin.close()
        self._process.stdout.close()
