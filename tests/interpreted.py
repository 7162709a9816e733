"""Triton decides when it is imported whether it interprets: tests that need its interpreter run in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
#: One case in so many of each test is run in the interpreter; a GPU runs all of them. 1: all here, too.
INTERPRET_EVERY = int(os.environ.get("INTERPRET_EVERY", "2"))
#: What takes minutes in the interpreter.
long = pytest.mark.skipif(INTERPRETED and INTERPRET_EVERY != 1, reason="takes minutes here: INTERPRET_EVERY=1 runs it")


def run_cases(path: str) -> None:
    """Run the tests of a file that have "case" in their names in an interpreting process.

    Raises
    ------
    AssertionError
        If one fails, or none ran.
    """
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "-k",
        "case",
        path,
    ]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
