"""How much host memory there is to offload into."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from alaya_hf.errors import HostMemoryError

GIB = 1 << 30

_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_V2 = ("memory.max", "memory.current", "inactive_file")


def _control_groups(root: Path) -> Iterator[tuple[Path, tuple[str, str, str]]]:
    """Folders of the control groups that this process's memory counts in, innermost first, and what their files are called."""
    groups = [(root, _V2, "/"), (root / "memory", _V1, "/")]
    try:
        for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                groups.append((root, _V2, path))
            elif "memory" in controllers.split(","):
                groups.append((root / "memory", _V1, path))
    except (OSError, ValueError):
        pass
    for base, names, path in groups:
        folder = base / path.lstrip("/")
        # A limit of any group above holds as well.
        while folder.is_relative_to(base):
            yield folder, names
            folder = folder.parent


def control_group_memory(root: Path = Path("/sys/fs/cgroup")) -> tuple[int, int] | None:
    """The tightest memory limit of a container that this process runs in.

    Returns
    -------
    limit, free : int
        Bytes allowed, and bytes left of them; file pages that can be dropped count as left. None: no limit.
    """
    found: list[tuple[int, int]] = []
    for folder, (limit_file, used_file, dropped) in _control_groups(root):
        try:
            limit = int((folder / limit_file).read_text(encoding="ascii"))
            used = int((folder / used_file).read_text(encoding="ascii"))
        except (OSError, ValueError):  # "max" is no number: no limit
            continue
        try:
            for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines():
                if line.startswith(f"{dropped} "):
                    used -= int(line.split()[1])
        except (OSError, ValueError):
            pass
        if limit < 1 << 60:  # the first version's way to say that there is none
            found.append((limit, min(limit, max(0, limit - used))))
    return min(found, key=lambda pair: pair[1], default=None)


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
    group = control_group_memory()
    return available if group is None else min(available, group[1])


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
