"""What a figure has to be quoted with: hardware, versions, date."""

from __future__ import annotations

import datetime
import os
import platform
from pathlib import Path
from typing import Any

import torch
import transformers

import alaya_hf


def processor() -> str:
    """Name of the CPU, as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def hardware(threads: int = 0) -> str:
    """Processor, cores (and threads used, if fewer), GPU."""
    cores = len(os.sched_getaffinity(0))
    where = f"{processor()}, {cores} cores"
    if threads:
        where += f" ({threads} threads)"
    if torch.cuda.is_available():
        where += f", {torch.cuda.get_device_name()}"
    return where


def versions() -> dict[str, Any]:
    """Versions and date, for a results folder."""
    return {
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "alaya_hf": alaya_hf.__version__,
        },
        "date": datetime.date.today().isoformat(),
    }


def describe(threads: int = 0) -> str:
    """One line: hardware, versions, date.

    Parameters
    ----------
    threads : int
        CPU threads that were used, 0 for all.
    """
    versions = f"torch {torch.__version__}, Transformers {transformers.__version__}, alaya_hf {alaya_hf.__version__}"
    return f"{hardware(threads)}; Python {platform.python_version()}, {versions}; {datetime.date.today().isoformat()}"
