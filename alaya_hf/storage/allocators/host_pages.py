"""Pages of host memory: an anonymous file, mapped piece by piece into reserved addresses."""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from alaya_hf.errors import PoolFullError, UnavailableError
from alaya_hf.storage.allocators.pages import Pages, check_page
from alaya_hf.storage.memory import check_host_memory

# Linux' values, the same on every architecture that torch has wheels for; Python's mmap does not name all of them.
_FIXED, _NORESERVE, _POPULATE, _PROT_NONE = 0x10, 0x4000, 0x8000, 0
_KEEP_SIZE, _PUNCH_HOLE = 1, 2
_FAILED = ctypes.c_void_p(-1).value


@lru_cache(maxsize=1)
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    word = ctypes.c_long
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, word]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, word, word]
    return libc


def _map(address: int | None, size: int, protection: int, flags: int, file: int, offset: int) -> int:
    found = _libc().mmap(address, size, protection, flags, file, offset)
    if found == _FAILED or found is None:
        raise PoolFullError(
            f"the system refused to map {size:,} bytes: {os.strerror(ctypes.get_errno())}. Free sequences, use larger pages "
            "(Linux allows vm.max_map_count mappings per process) or raise the limit on address space (ulimit -v)."
        )
    return found


def _close(file: int, reservations: dict[int, int]) -> None:
    for address, size in reservations.items():
        _libc().munmap(address, size)
    os.close(file)


class HostPages(Pages):
    """See :class:`Pages`. Physical memory is a file that exists in memory only (``memfd_create``), so that two sequences map
    the same page; addresses are reserved without access (``PROT_NONE``): touching what is not mapped ends the process.

    Raises
    ------
    UnavailableError
        On anything but Linux.
    HostMemoryError
        If the host has less memory than the capacity.
    """

    def __init__(self, capacity: int, page: int) -> None:
        if not hasattr(os, "memfd_create"):
            raise UnavailableError(
                "mapping memory on demand needs Linux (memfd_create). Use another allocator, for example 'segment'."
            )
        check_page(page, mmap.PAGESIZE)
        super().__init__(capacity, page)
        check_host_memory(self.capacity, "a KV pool")
        self._file = os.memfd_create("alaya_hf")
        self._reservations: dict[int, int] = {}
        weakref.finalize(self, _close, self._file, self._reservations).atexit = False
        os.ftruncate(self._file, self.capacity)

    def view(self, offset: int, size: int) -> Tensor:
        """See :meth:`Arena.view`."""
        if size == 0:
            return torch.empty(0, dtype=torch.uint8)
        block: Any = (ctypes.c_uint8 * size).from_address(offset)
        block.pages = self  # torch keeps what a tensor was made from
        return torch.frombuffer(block, dtype=torch.uint8)

    def reserve(self, size: int) -> int:
        """See :meth:`Pages.reserve`."""
        address = _map(None, size, _PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE, -1, 0)
        self._reservations[address] = size
        return address

    def release(self, address: int, size: int) -> None:
        """See :meth:`Pages.release`."""
        _libc().munmap(address, size)
        del self._reservations[address]

    def map(self, address: int, pages: Sequence[int]) -> None:
        """See :meth:`Pages.map`. One system call per run of pages with consecutive numbers, which also makes them: a kernel
        that reads through finds no page missing."""
        begin, access, flags = 0, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | _FIXED | _POPULATE
        try:
            for place in range(1, len(pages) + 1):
                if place == len(pages) or pages[place] != pages[place - 1] + 1:
                    target, size = address + begin * self.page, (place - begin) * self.page
                    _map(target, size, access, flags, self._file, pages[begin] * self.page)
                    begin = place
        except PoolFullError:
            self.unmap(address, begin)
            raise

    def unmap(self, address: int, count: int) -> None:
        """See :meth:`Pages.unmap`."""
        if count:
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE | _FIXED
            _map(address, count * self.page, _PROT_NONE, flags, -1, 0)

    def _make(self, page: int) -> None:
        """The file makes its pages when they are mapped."""

    def _drop(self, page: int) -> None:
        _libc().fallocate(self._file, _KEEP_SIZE | _PUNCH_HOLE, page * self.page, self.page)
