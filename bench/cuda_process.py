"""The driver's side of `bench/cuda_decode.py`: a contestant in a process of its own."""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Self

_ROOT = Path(__file__).resolve().parents[1]


class ContestantError(RuntimeError):
    """A contestant's process failed or took too long; the message holds what it said."""


class ContestantProcess:
    """One contestant, alive until it has measured, or until the end of the `with` block.

    Args:
        name: a file in `bench/cuda_contestants/`, without `.py`.
        folder: the checkpoint.
        device: "cuda", or "cpu" for a trial.
        scale: what the workloads' sizes are divided by.
        decodes: names of the decode workloads; None: all.
        settings: further arguments of the contestant.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        *,
        device: str = "cuda",
        scale: int = 1,
        decodes: list[str] | None = None,
        settings: dict | None = None,
    ):
        self.name = name
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        command = [sys.executable, "-m", f"bench.cuda_contestants.{name}", str(folder)]
        command += ["--device", device, "--scale", str(scale), "--decodes", json.dumps(decodes)]
        command += ["--settings", json.dumps(settings or {})]
        paths = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"},
            start_new_session=True,  # so that compilers it starts can be ended with it
        )
        self._lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def wait_ready(self, until: float) -> dict:
        """What the contestant says of itself once it is prepared.

        Args:
            until: on the clock of `time.monotonic`.
        """
        return self._answer(until)["ready"]

    def measure(self, seconds: float) -> dict:
        """Its figures; the process then ends."""
        with contextlib.suppress(BrokenPipeError):  # the missing answer tells of it
            print("measure", file=self._process.stdin, flush=True)
        return self._answer(time.monotonic() + seconds)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.stdout.close()
        self._errors.close()

    def _read(self) -> None:
        with contextlib.suppress(ValueError):  # closed meanwhile
            for line in self._process.stdout:
                self._lines.put(line)
        self._lines.put("")

    def _answer(self, until: float) -> dict:
        try:
            line = self._lines.get(timeout=max(0.0, until - time.monotonic()))
        except queue.Empty:
            raise ContestantError(f"{self.name} took too long:\n{self._said()}") from None
        if not line:
            code = self._process.wait()
            raise ContestantError(f"{self.name} ended with exit code {code}:\n{self._said()}")
        answer = json.loads(line)
        if "error" in answer:
            raise ContestantError(f"{self.name} failed:\n{answer['error']}")
        return answer

    def _said(self) -> str:
        self._errors.seek(0)
        return self._errors.read()[-3000:]
