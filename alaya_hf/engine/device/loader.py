"""Stored layers on their way to a device, layer by layer, while the first ones are computed on."""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from alaya_hf.engine.device.stream import side_stream
from alaya_hf.storage.db.records import NAME, StoredRecords
from alaya_hf.storage.db.registered import RegisteredFile
from alaya_hf.storage.db.vector_file import VectorFile

_SLICE = 1 << 14  # blocks verified at a time by one thread: 64 MiB
_THREADS = 8


@dataclass(frozen=True)
class Needed:
    """What one layer reads of a file.

    Parameters
    ----------
    registered : RegisteredFile
    start, stop : int
        Tokens of the file, of all KV heads.
    """

    registered: RegisteredFile
    start: int
    stop: int

    def blocks(self) -> np.ndarray:
        """The file's blocks that hold them, ascending."""
        file, kv = self.registered.file, self.registered.file.tensors["kv"]
        heads, tokens, _, head_dim = kv.shape
        row = 2 * head_dim * kv.element_size()
        spans = [
            file.blocks_of("kv", (head * tokens + self.start) * row, (self.stop - self.start) * row)
            for head in range(heads)
        ]
        return np.unique(np.concatenate(spans))


class Incoming:
    """A layer on its way: whether its vectors can be read by the device, and its records lie there."""

    def __init__(self) -> None:
        self._work: Future[torch.cuda.Event | None] | None = None
        self._arrived = False

    @property
    def arrived(self) -> bool:
        """Whether :meth:`wait` would not wait any more."""
        return self._arrived

    def wait(self, device: torch.device) -> None:
        """Let the host wait until the vectors are verified and registered, and the current stream until the records are there.

        Raises
        ------
        CorruptStoreError
            If a block does not match its checksum, also whenever it is asked again.
        HostMemoryError
            See :meth:`RegisteredFile.register`.
        """
        if self._arrived:
            return
        assert self._work is not None
        event = self._work.result()
        if event is not None:
            torch.cuda.current_stream(device).wait_event(event)
        self._arrived = True


class Loader:
    """Brings the layers of one context, in the order in which they are asked for.

    Every block is verified before its layer is used: of the vectors those that the attached prefix lies in, of the records all
    of a file's. Threads of its own verify (checksums, about 10 GB/s each, which also reads a cold file ahead), one more registers
    a layer's file and starts the copy of its records on a side stream. Nobody waits for a layer but the first work on it.
    A loader whose layers are forgotten stops.

    Notes
    -----
    Records are copied from the registered mapping itself: it is pinned, so nothing is staged.
    """

    def __init__(self) -> None:
        allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self._checks = ThreadPoolExecutor(max(1, min(_THREADS, allowed - 1)), thread_name_prefix="alaya-verify")
        self._works = ThreadPoolExecutor(1, thread_name_prefix="alaya-attach")
        self._pending: list[Future] = []
        weakref.finalize(self, _cancel, self._pending)

    def bring(self, needed: Needed, records: Sequence[StoredRecords], target: Tensor, device: torch.device) -> Incoming:
        """Start to bring a layer.

        Parameters
        ----------
        needed : Needed
            The vectors that are attended in place.
        records : sequence of StoredRecords
        target : Tensor ``[kv_heads, tiles, words]`` int32
            On the device; written at the tiles' places. Made on the current stream.
        device : torch.device
        """
        arrival = Incoming()
        blocks: list[tuple[VectorFile, np.ndarray, str]] = [(needed.registered.file, needed.blocks(), "data")]
        blocks += [(piece.file, piece.file.blocks_of(NAME), "index") for piece in records]
        checks = [
            self._checks.submit(file.verify, chosen[at : at + _SLICE], kind)
            for file, chosen, kind in blocks
            for at in range(0, len(chosen), _SLICE)
        ]
        made = None
        if device.type == "cuda":
            made = torch.cuda.Event()
            made.record(torch.cuda.current_stream(device))
            target.record_stream(side_stream(device, "read"))
        arrival._work = self._works.submit(_bring, checks, needed.registered, list(records), target, device, made)
        self._pending += [*checks, arrival._work]
        # The loader lives, and works, as long as somebody waits for it.
        arrival._loader = self  # type: ignore[attr-defined]
        return arrival

    def close(self) -> None:
        """Nothing more will be asked for; what was asked for is brought."""
        self._checks.shutdown(wait=False)
        self._works.shutdown(wait=False)


def _cancel(pending: list[Future]) -> None:
    for work in pending:
        work.cancel()


@torch.no_grad()
def _bring(
    checks: list[Future[None]],
    registered: RegisteredFile,
    records: list[StoredRecords],
    target: Tensor,
    device: torch.device,
    made: torch.cuda.Event | None,
) -> torch.cuda.Event | None:
    for check in checks:
        check.result()
    registered.register(device)
    if device.type != "cuda":
        for piece in records:
            target[:, piece.tiles.start : piece.tiles.stop] = piece.view
        return None
    side = side_stream(device, "read")
    with torch.cuda.device(device), torch.cuda.stream(side):
        if made is not None:
            side.wait_event(made)
        for piece in records:
            # One copy per KV head, contiguous on both sides.
            for to, part in zip(target[:, piece.tiles.start : piece.tiles.stop], piece.view, strict=True):
                to.copy_(part, non_blocking=True)
        event = torch.cuda.Event()
        event.record(side)
    return event


__all__ = ["Incoming", "Loader", "Needed"]
