"""The shortest form of `make soak`; continuous integration has a longer one."""

import subprocess
import sys

from tests.children import ROOT


def test_everything_at_once():
    # Within so short a time the first of everything still adds to the memory.
    command = [sys.executable, "-m", "tests.soak", "--minutes", "0.1", "--most-growth", "0.1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("all is as it was\n")
