"""Stored layers on their way to a device: records first, vectors when they are worth it."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from alaya_hf.engine.device.stream import side_stream
from alaya_hf.storage.db.reader import StoredLayer
from alaya_hf.storage.db.records import NAME, StoredRecords
from alaya_hf.storage.db.registered import RegisteredFile
from alaya_hf.storage.db.vector_file import VectorFile
from alaya_hf.storage.pinned import pinned_pool

_SLICE = 1 << 13  # blocks verified at a time by one thread: 32 MiB
_THREADS = 16


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

    def blocks(self) -> Iterator[range]:
        """The file's blocks that hold them; neighbours may share one."""
        file, kv = self.registered.file, self.registered.file.tensors["kv"]
        heads, tokens, _, head_dim = kv.shape
        if (self.start, self.stop) == (0, tokens):
            yield file.blocks_of("kv")
            return
        row = 2 * head_dim * kv.element_size()
        for head in range(heads):
            yield file.blocks_of("kv", (head * tokens + self.start) * row, (self.stop - self.start) * row)


def _threads() -> int:
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(_THREADS, allowed - 1))


@cache
def _pool(kind: str, threads: int = 0) -> ThreadPoolExecutor:
    """Threads of all sessions for one kind of work, which waits behind its own kind only."""
    return ThreadPoolExecutor(threads or _threads(), f"alaya-{kind}")


class Incoming:
    """A layer on its way: whether its records lie on the device, and whether its vectors can be read by it.

    Made by :meth:`Loader.bring`.
    """

    def __init__(self, loader: Loader, needed: Needed, device: torch.device) -> None:
        # The loader lives, and works, as long as somebody waits for it.
        self._loader, self._needed, self._device = loader, needed, device
        self._records: Future[torch.cuda.Event | None] | None = None
        self._vectors: Future[None] | None = None
        self._lock = threading.Lock()
        self._arrived = False

    def wait_for_records(self) -> None:
        """Let the current stream wait until the records are on the device, and the host until that is certain.

        Raises
        ------
        CorruptStoreError
            If a block does not match its checksum, also whenever it is asked again.
        HostMemoryError
            See :meth:`RegisteredFile.register`.
        """
        if self._arrived:
            return
        assert self._records is not None
        event = self._records.result()
        if event is not None:
            torch.cuda.current_stream(self._device).wait_event(event)
        self._arrived = True

    def bring_vectors(self) -> Future[None]:
        """Start to verify the vectors and to register their pages; a second time, nothing."""
        with self._lock:
            if self._vectors is None:
                self._vectors = self._loader._bring_vectors(self._needed, self._device)
            return self._vectors

    @property
    def has_vectors(self) -> bool:
        """Whether the device can read the vectors where they lie.

        Raises
        ------
        CorruptStoreError, HostMemoryError
            If they were asked for and cannot be brought.
        """
        vectors = self._vectors
        if vectors is None or not vectors.done():
            return False
        vectors.result()
        return True


class Loader:
    """Brings the layers of one context, in the order in which they are asked for.

    Every block is verified before it is used. Records come first and at once: threads verify them (checksums, which also reads
    a cold file ahead), one more registers their pages with CUDA and starts their copy on a side stream. Vectors are
    brought as a whole when somebody asks for that: all blocks that the attached prefix lies in are verified and their pages
    registered, so that kernels read them in place. Until then :meth:`~alaya_hf.storage.db.vector_file.VectorFile.fetcher`
    reads the few that a pass retrieves. Nobody waits for a layer but the first work on it. A loader whose layers are forgotten
    stops.

    Notes
    -----
    Records are copied from the registered mapping itself: it is pinned, so nothing is staged. Measured on one H100 with 16 cores:
    checksums of a mapping 40 GB/s, registration 40 GiB/s, copies to the device 50 GB/s, side by side.
    """

    def __init__(self) -> None:
        self._pending: list[Future] = []
        self._reads: list[Future[list[Tensor]]] = []
        weakref.finalize(self, _cancel, self._pending)

    def expect(self, files: Iterable[VectorFile]) -> None:
        """Verify the checksums of files that are about to be asked for, side by side; what is wrong shows when they are."""
        self._pending += [_pool("verify-records").submit(file.check_sums) for file in files]

    def read(self, layer: StoredLayer, spans: Sequence[tuple[int, int]], pinned: bool) -> Future[list[Tensor]]:
        """Start to read some of a layer's tokens, verified: what its window holds.

        Parameters
        ----------
        layer : StoredLayer
        spans : sequence of (int, int)
            Tokens, from and to.
        pinned : bool
            Into pinned memory, from where copies to a device need not be waited for.
        """
        work = _pool("verify-records").submit(_read, layer, spans, pinned)
        self._reads.append(work)
        return work

    def attached(self) -> None:
        """All layers have what :meth:`read` read: its memory may go. Not before: the pool waits for the device then."""
        self._reads.clear()

    def bring(self, needed: Needed, records: Sequence[StoredRecords], target: Tensor, device: torch.device) -> Incoming:
        """Start to bring a layer's records.

        Parameters
        ----------
        needed : Needed
            The vectors that are attended in place.
        records : sequence of StoredRecords
        target : Tensor ``[kv_heads, tiles, words]`` int32
            On the device; written at the tiles' places. Made on the current stream.
        device : torch.device
        """
        arrival = Incoming(self, needed, device)
        made = None
        if device.type == "cuda":
            made = torch.cuda.Event()
            made.record(torch.cuda.current_stream(device))
            target.record_stream(side_stream(device, "read"))
        checks = [
            check for piece in records for check in self._check(piece.file, [piece.file.blocks_of(NAME)], "records")
        ]  # fmt: skip
        arrival._records = _pool("bring-records", 1).submit(_bring_records, checks, list(records), target, device, made)
        self._pending.append(arrival._records)
        return arrival

    def _bring_vectors(self, needed: Needed, device: torch.device) -> Future[None]:
        checks = self._check(needed.registered.file, needed.blocks(), "vectors")
        work = _pool("bring-vectors", 1).submit(_bring_vectors, checks, needed.registered, device)
        self._pending.append(work)
        return work

    def _check(self, file: VectorFile, blocks: Iterable[range], kind: str) -> list[Future[None]]:
        checks = [
            _pool(f"verify-{kind}").submit(file.verify, span[at : at + _SLICE])
            for span in blocks
            for at in range(0, len(span), _SLICE)
        ]
        self._pending += checks
        return checks


def _cancel(pending: list[Future]) -> None:
    for work in pending:
        work.cancel()


def _read(layer: StoredLayer, spans: Sequence[tuple[int, int]], pinned: bool) -> list[Tensor]:
    found = [layer.read(*span) for span in spans]
    if not pinned:
        return found
    pool = pinned_pool()
    return [pool.allocate(rows.shape, rows.dtype).copy_(rows) for rows in found]


def _bring_vectors(checks: list[Future[None]], registered: RegisteredFile, device: torch.device) -> None:
    for check in checks:
        check.result()
    registered.register(device)


@torch.no_grad()
def _bring_records(
    checks: list[Future[None]],
    records: list[StoredRecords],
    target: Tensor,
    device: torch.device,
    made: torch.cuda.Event | None,
) -> torch.cuda.Event | None:
    for check in checks:
        check.result()
    if device.type != "cuda":
        for piece in records:
            target[:, piece.tiles.start : piece.tiles.stop] = piece.view
        return None
    side = side_stream(device, "read")
    with torch.cuda.device(device), torch.cuda.stream(side):
        if made is not None:
            side.wait_event(made)
        held = []
        for piece in records:
            registered = RegisteredFile.of(piece.file)
            registered.register_records(device)
            held.append(registered)
            # One copy per KV head, contiguous on both sides.
            for to, part in zip(target[:, piece.tiles.start : piece.tiles.stop], piece.view, strict=True):
                to.copy_(part, non_blocking=True)
        event = torch.cuda.Event()
        event.record(side)
    # Pages that nobody else reads are released, after the copies.
    del held
    return event


def fetch_lists(
    file: VectorFile, ids: Tensor, counts: Tensor, firsts: Tensor, lasts: Tensor, origin: int, out: Tensor
) -> None:
    """:meth:`VectorFile.fetcher`'s work, all lists, by several threads.

    Parameters
    ----------
    ids : Tensor ``[lists, cap]`` int32
    counts : Tensor ``[lists]`` int32
    firsts, lasts : Tensor ``[batch]`` int64
    origin : int
    out : Tensor ``[lists, cap, 2, head_dim]``
        All on the host.
    """
    lists = ids.shape[0]
    if not out.numel():
        return
    rows = out.view(torch.uint8).view(lists, ids.shape[1], -1).numpy()
    fetch = file.fetcher(ids.numpy(), counts.numpy(), firsts.numpy(), lasts.numpy(), origin, rows)
    step = -(-lists // _threads())
    # Threads of their own: behind the records of all later layers a pass would wait for those.
    work = [_pool("fetch").submit(fetch, at, min(at + step, lists)) for at in range(0, lists, step)]
    errors = [error for error in (each.exception() for each in work) if error is not None]
    if errors:
        raise errors[0]


__all__ = ["Incoming", "Loader", "Needed", "fetch_lists"]
