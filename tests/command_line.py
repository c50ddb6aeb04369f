"""The command line, run within this process: another one's imports take longer than most commands.

What a process of its own shows besides is in `tests/tools/test_cli.py::test_generate`.
"""

import contextlib
import io
import subprocess
import sys
from unittest import mock

from sglite.tools.cli import main


def run(*arguments, input: str = "") -> subprocess.CompletedProcess:
    """What `python -m sglite ARGUMENTS` gives: exit status and what it prints."""
    printed, said = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "stdin", io.StringIO(input)),
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(said),
    ):
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as error:  # as Python itself ends on one
            status = error.code
            if isinstance(status, str):
                print(status, file=sys.stderr)
                status = 1
    return subprocess.CompletedProcess(arguments, status, printed.getvalue(), said.getvalue())
