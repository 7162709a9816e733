"""Evaluation by several processes, started by ``accelerate launch`` or ``torchrun``, on one machine or several."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

#: How long the first process waits for the slowest one.
_PATIENCE = timedelta(days=7)


def launched() -> bool:
    """Whether a launcher started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1 and "MASTER_ADDR" in os.environ


def gather_rows(folder: Path) -> None:
    """Wait until every process is through, and let the first one's folder hold the rows of all.

    Parameters
    ----------
    folder : Path
        Where each process has written ``rows.<rank>.jsonl`` and ``skipped.<rank>.jsonl``: one folder for all, or one per machine.

    Notes
    -----
    Through gloo, over the network: machines need not share a disk. A process that dies takes the launch with it; the same command
    goes on from the rows that there are.
    """
    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", timeout=_PATIENCE)
    try:
        mine = {path.name: path.read_bytes() for path in folder.glob(f"*.{rank}.jsonl")}
        everyone: list[dict[str, bytes]] | None = [{}] * count if rank == 0 else None
        dist.gather_object(mine, everyone)
        for files in everyone or []:
            for name, data in files.items():
                path = folder / name
                if not path.exists() or path.stat().st_size < len(data):
                    path.write_bytes(data)
        dist.barrier()
    finally:
        dist.destroy_process_group()
