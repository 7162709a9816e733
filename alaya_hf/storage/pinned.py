"""Host memory that the GPU reads and writes directly: one pool per process."""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alaya_hf.errors import HostMemoryError
from alaya_hf.storage import memory
from alaya_hf.storage.blocks import LARGE, SMALL, BlockAllocator, block_bytes

FIRST = 64 << 20  # bytes; the first region, unless more is asked for
MOST = memory.GIB  # bytes; how much more than what is asked for a region may hold
_THREADS = 16  # more do not fault pages in faster
_SLICE = 32 << 20
#: Held while a CUDA graph is captured, and by threads that register or release memory: neither may meet the other.
CAPTURING = threading.Lock()
_PORTABLE_MAPPED = 1 | 2  # cudaHostRegister: known to every device, at the same address


@dataclass(frozen=True)
class PoolStats:
    """What a pool holds, in bytes.

    Attributes
    ----------
    held : int
        Taken from the system.
    used : int
        In blocks of living tensors, rounded up to whole blocks.
    peak : int
        Most that was ever used.
    regions : int
    largest : int
        Largest free block.
    pinned : bool
        Whether CUDA knows all of it; false on a machine without CUDA.
    seconds : float
        Spent on taking memory from the system and registering it.
    """

    held: int
    used: int
    peak: int
    regions: int
    largest: int
    pinned: bool
    seconds: float


def _touch(view: np.ndarray) -> None:
    """Have every page of ``[n]`` uint8 made. Several threads: making pages is what takes long; numpy lets go of the lock."""
    starts = range(0, len(view), _SLICE)
    workers = min(_THREADS, len(starts), len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 4)

    def fill(start: int) -> None:
        view[start : start + _SLICE : SMALL] = 0

    with ThreadPoolExecutor(max(1, workers)) as threads:
        list(threads.map(fill, starts))


def clear_cuda_error() -> None:
    """Forget CUDA's last error.

    A refused registration stays behind as the last error, which the next kernel launch would report as its own.
    """
    try:
        torch.ones(1, device="cuda")
    except RuntimeError:
        pass


def _unregister(start: int) -> None:
    torch.cuda.cudart().cudaHostUnregister(start)


class _Region:
    """One run of memory from the system, whole huge pages, registered with CUDA where there is CUDA, until nobody refers to it.

    Raises
    ------
    OSError, RuntimeError
        If there is none to be had.
    """

    def __init__(self, size: int, cuda: bool) -> None:
        self.size = size
        self._owner: Any = None
        if hasattr(mmap, "MAP_ANONYMOUS"):
            # One huge page more than needed, never touched: the system need not align what it gives.
            self._owner = mmap.mmap(-1, size + LARGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            if hasattr(mmap, "MADV_HUGEPAGE"):
                try:
                    self._owner.madvise(mmap.MADV_HUGEPAGE)
                except OSError:
                    pass  # a kernel without huge pages
            whole = np.frombuffer(self._owner, dtype=np.uint8)
            offset = -whole.ctypes.data % LARGE
            _touch(whole[offset : offset + size])
            self.start = whole.ctypes.data + offset
            if not cuda:
                return
            torch.cuda.init()
            if int(torch.cuda.cudart().cudaHostRegister(self.start, size, _PORTABLE_MAPPED)) == 0:
                # Before the memory goes, also where a pool is forgotten instead of trimmed.
                weakref.finalize(self, _unregister, self.start).atexit = False
                return
            clear_cuda_error()
            del whole
            self._owner = None
        # No registration of ordinary memory here: CUDA's own, much slower to make.
        self._owner = torch.empty(size + LARGE, dtype=torch.uint8, pin_memory=cuda)
        self.start = -(-self._owner.data_ptr() // LARGE) * LARGE


class PinnedPool:
    """Pinned host memory, taken from the system in large regions and handed out in blocks.

    Regions come from anonymous memory in huge pages, touched by several threads and registered with ``cudaHostRegister``:
    a fraction of what ``pin_memory=True`` takes. Freed blocks are used again; nothing goes back to the
    system before :meth:`trim`. Without CUDA the pool works the same on memory that is not registered.

    Parameters
    ----------
    cuda : bool, optional
        Register with CUDA. Default: if there is a device.

    Notes
    -----
    A block that comes back may still be read or written by work in flight on a device. Before a pool hands out memory after
    that, it waits once for the devices that were current when it handed out blocks. Not for use across ``fork``.
    """

    def __init__(self, cuda: bool | None = None) -> None:
        self._cuda = torch.cuda.is_available() if cuda is None else cuda
        self._blocks = BlockAllocator()
        self._regions: dict[int, _Region] = {}
        # Held for a moment only by whoever makes memory in the background, who notifies.
        self._lock = threading.Condition(threading.RLock())
        self._coming = 0  # bytes that are being made
        # Finalizers run wherever the garbage collector does, also inside the methods below: they only leave a note.
        self._returned: deque[int] = deque()
        self._devices: set[int] = set()
        self._stale = False
        self._peak, self._seconds = 0, 0.0

    def allocate(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor in pinned memory, whose block returns when the last tensor on it dies, views included.

        Parameters
        ----------
        shape : sequence of int
        dtype : torch.dtype

        Raises
        ------
        HostMemoryError
            If neither pool nor host has room; the pool stays as it was.
        """
        size = prod(shape) * dtype.itemsize
        with torch.inference_mode(False):  # what is made in inference mode could not be written to later
            if size == 0:
                return torch.empty(tuple(shape), dtype=dtype)
            with self._lock:
                start, region = self._take(size)
                # ctypes arrays carry attributes and weak references; torch keeps the one that a tensor was made from.
                block = (ctypes.c_uint8 * size).from_address(start)
                block.region = region  # type: ignore[attr-defined]
                weakref.finalize(block, self._returned.append, start).atexit = False
            return torch.frombuffer(block, dtype=dtype).view(tuple(shape))

    def prepare(self, size: int, count: int) -> None:
        """Begin to make room for `count` blocks of `size` bytes, in a thread; :meth:`allocate` waits for what is on its way.

        Parameters
        ----------
        size, count : int
            Bytes of a block, and blocks. What the pool has free counts towards them.

        Notes
        -----
        A hint: what the host cannot hold is not made, and :meth:`allocate` says so when it is wanted.
        """
        block = block_bytes(size)
        with self._lock:
            self._collect()
            missing = block * count - (self._blocks.held - self._blocks.used) - self._coming
            if missing <= 0 or block < LARGE:
                return
            region = block * max(1, min(count, MOST // block))
            count = -(-missing // region)
            if region * count > self._room():
                return
            self._coming += region * count
        device = torch.cuda.current_device() if self._cuda else None
        threading.Thread(target=self._make, args=(region, count, device), name="alaya-pinned", daemon=True).start()

    def _make(self, size: int, count: int, device: int | None) -> None:
        if device is not None:
            torch.cuda.set_device(device)  # of this thread: a context elsewhere would cost its memory
        for left in range(count, 0, -1):
            begin = time.perf_counter()
            try:
                region = _Region(size, self._cuda)
            except (OSError, RuntimeError):
                with self._lock:
                    self._coming -= size * left
                    self._lock.notify_all()
                return
            with self._lock:
                self._coming -= size
                self._add(region, begin)
                self._lock.notify_all()

    def _add(self, region: _Region, begin: float) -> None:
        self._seconds += time.perf_counter() - begin
        self._blocks.add(region.start, region.size)
        self._regions[region.start] = region

    def trim(self) -> int:
        """Give regions of which nothing is used back to the system; returns their bytes."""
        with self._lock:
            self._collect()
            idle = self._blocks.idle
            if idle:
                self._wait()
            return sum(self._drop(start) for start in idle)

    def check_room(self, size: int, what: str) -> None:
        """Refuse what pool and host together cannot hold, before anything is allocated.

        Parameters
        ----------
        size : int
            Bytes, all blocks together.
        what : str
            What they are for, for the message.

        Raises
        ------
        HostMemoryError
        """
        with self._lock:
            self._collect()
            free = self._blocks.held - self._blocks.used
            # Asking the system takes a while: only where it matters.
            if size > free and size > free + max(self._coming, self._room()):
                raise self._error(size, what)

    @property
    def stats(self) -> PoolStats:
        """What the pool holds now."""
        with self._lock:
            self._collect()
            blocks = self._blocks
            return PoolStats(
                held=blocks.held,
                used=blocks.used,
                peak=self._peak,
                regions=len(self._regions),
                largest=blocks.largest,
                pinned=self._cuda,
                seconds=self._seconds,
            )

    def _take(self, size: int) -> tuple[int, _Region]:
        self._collect()
        start = self._blocks.allocate(size)
        while start is None and self._coming >= block_bytes(size):
            self._lock.wait()
            start = self._blocks.allocate(size)
        if start is None:
            self._grow(size)
            start = self._blocks.allocate(size)
            assert start is not None
        if self._stale:
            self._wait()
        if self._cuda:
            self._devices.add(torch.cuda.current_device())
        self._peak = max(self._peak, self._blocks.used)
        return start, max((s, r) for s, r in self._regions.items() if s <= start)[1]

    def _collect(self) -> None:
        """Take back the blocks of tensors that died."""
        while self._returned:
            self._blocks.free(self._returned.popleft())
            self._stale = True

    def _wait(self) -> None:
        for device in self._devices:
            torch.cuda.synchronize(device)
        self._stale = False

    def _drop(self, start: int) -> int:
        del self._regions[start]
        return self._blocks.remove(start)

    @staticmethod
    def _room() -> int:
        """Bytes that may be taken from the host: pinned pages cannot be swapped out, so a little is left to others."""
        free = memory.available_host_memory()
        return max(0, free - free // 32)

    def _grow(self, size: int) -> None:
        """A new region with room for `size` bytes."""
        needed, room = -(-block_bytes(size) // LARGE) * LARGE, self._room()
        if needed > room:
            # Regions that are too small for this block may still make room for a larger one.
            self.trim()
            room = self._room()
        if needed > room:
            raise self._error(size, "pinned memory")
        # As much again as there is, within reason: few regions, however small the blocks.
        wanted = max(needed, min(MOST, max(FIRST, self._blocks.held), room // 8 // LARGE * LARGE))
        begin = time.perf_counter()
        for attempt in sorted({needed, wanted}, reverse=True):
            try:
                region = _Region(attempt, self._cuda)
                break
            except (OSError, RuntimeError) as error:
                if self._cuda:
                    clear_cuda_error()
                failure = error
        else:
            raise self._error(size, "pinned memory", failure) from failure
        self._add(region, begin)

    def _error(self, size: int, what: str, cause: Exception | None = None) -> HostMemoryError:
        free, blocks, gib = memory.available_host_memory(), self._blocks, memory.GIB
        because = "" if cause is None else f" The system refused: {cause}."
        return HostMemoryError(
            f"{what} needs {size:,} bytes ({size / gib:.2f} GiB) of host memory, but {free:,} bytes ({free / gib:.2f} GiB) are "
            f"free on the host, and the pool has {blocks.held - blocks.used:,} of its {blocks.held:,} bytes free, "
            f"{blocks.largest:,} in one piece.{because} Shorten the context, use a smaller batch, delete caches that are no "
            "longer needed, or raise the container's memory limit."
        )


@lru_cache(maxsize=1)
def pinned_pool() -> PinnedPool:
    """The pool of this process."""
    return PinnedPool()
