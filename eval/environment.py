"""What a figure has to be quoted with: hardware, versions, date."""

from __future__ import annotations

import datetime
import os
import platform
from pathlib import Path

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


def describe() -> str:
    """One line: hardware, versions, date."""
    cores = len(os.sched_getaffinity(0))
    where = f"{processor()}, {cores} cores"
    if torch.cuda.is_available():
        where += f", {torch.cuda.get_device_name()}"
    return (
        f"{where}; Python {platform.python_version()}, torch {torch.__version__}, Transformers {transformers.__version__}, "
        f"alaya_hf {alaya_hf.__version__}; {datetime.date.today().isoformat()}"
    )
