"""How much host memory there is to offload into."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from alaya_hf.errors import HostMemoryError

GIB = 1 << 30


def available_host_memory() -> int:
    """Bytes of host memory that can be taken without swapping: the kernel's estimate, capped by a container's limit."""
    available = None
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                available = int(line.split()[1]) * 1024
                break
    except OSError:
        pass
    if available is None:
        # No /proc outside Linux: half of what is installed is the best that can be said without a dependency.
        available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
        if limit != "max":
            used = int(Path("/sys/fs/cgroup/memory.current").read_text(encoding="ascii"))
            available = min(available, max(0, int(limit) - used))
    except (OSError, ValueError):
        pass
    return available


def check_room(per_row: int, rows: Tensor) -> None:
    """Refuse to offload what the host cannot hold. Equal rows are stored once, so they count once.

    Parameters
    ----------
    per_row : int
        Bytes that one row needs.
    rows : Tensor
        ``[batch, ...]``, what tells the rows apart; compared only where it matters.

    Raises
    ------
    HostMemoryError
        With the bytes needed and free.
    """
    count = rows.shape[0]
    if count > 1 and count * per_row > available_host_memory():
        distinct: list[Tensor] = []
        for row in rows:
            if not any(torch.equal(row, other) for other in distinct):
                distinct.append(row)
        count = len(distinct)
    check_host_memory(count * per_row, "offloading this context in all layers")


def check_host_memory(needed: int, what: str) -> None:
    """Refuse an allocation that the host cannot hold, before anything is allocated.

    Parameters
    ----------
    needed : int
        Bytes about to be allocated.
    what : str
        What they are for, for the message.

    Raises
    ------
    HostMemoryError
        With the bytes needed and free.
    """
    free = available_host_memory()
    if needed > free:
        raise HostMemoryError(
            f"{what} needs {needed:,} bytes ({needed / GIB:.2f} GiB) of host memory, but {free:,} bytes "
            f"({free / GIB:.2f} GiB) are free. Shorten the context, use a smaller batch, or set "
            f"store_dtype='bfloat16' (with engine='device': 'int8') to store less per token."
        )
