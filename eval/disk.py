"""What the disk does, for comparison."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path


def dd_rate(folder: Path, nbytes: int) -> float:
    """Bytes per second of ``dd`` with fsync, writing about `nbytes` to a file in `folder`, removed afterwards."""
    target = folder / "dd"
    count = max(1, nbytes >> 22)
    began = time.perf_counter()
    subprocess.run(
        ["dd", "if=/dev/zero", f"of={target}", "bs=4M", f"count={count}", "conv=fsync"], check=True, capture_output=True
    )
    rate = (count << 22) / (time.perf_counter() - began)
    target.unlink()
    return rate
