"""Functions of the tests that run in a process of their own."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run_in_child(function: Callable[[], None], timeout: float = 300) -> str:
    """Runs a function of a test module in a fresh process; returns what it printed.

    SIGINT raises KeyboardInterrupt there, also where a shell has started these tests in the
    background, with the signal ignored.
    """
    code = (
        f"import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        f"from {function.__module__} import {function.__name__} as run; run()"
    )
    environment = {k: v for k, v in os.environ.items() if k != "PYTEST_CURRENT_TEST"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout
