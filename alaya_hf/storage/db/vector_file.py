"""Vector files: safetensors with one layer of one segment, checksummed, read in place.

Layout: the header (JSON, padded with spaces to a whole page), ``kv`` ``[kv_heads, tokens, 2, head_dim]``, padded to a
whole page, what is stored beside it, padding to a whole page, and ``checksums`` of every page before them. The catalog
keeps digests of the header and of the checksums, which makes it the root of what is trusted.
"""

from __future__ import annotations

import ctypes
import errno
import json
import math
import mmap
import os
import re
import stat
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alaya_hf.errors import CorruptStoreError, StoreError
from alaya_hf.kernels.cpu.checksum import BLOCK, block_checksums, first_damaged, verify_range
from alaya_hf.kernels.cpu.fetch import fetch_rows
from alaya_hf.storage.db.buffer_manager import FRAME, BufferManager
from alaya_hf.storage.db.hashing import digest

DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_NAME = re.compile(r"[A-Za-z0-9_.]{1,200}")
_MAX_HEADER = 1 << 26
_CHUNK = 1 << 22
_INT64 = (1 << 63) - 1


@dataclass(frozen=True)
class Source:
    """A tensor to write, given as consecutive pieces of its bytes.

    Parameters
    ----------
    dtype : torch.dtype
    shape : tuple of int
    pieces : list of Tensor
        Contiguous, of ``dtype``, on the host.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: list[Tensor]

    @classmethod
    def of(cls, tensor: Tensor) -> Source:
        """A tensor as it is."""
        return cls(tensor.dtype, tuple(tensor.shape), [tensor.contiguous()])

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Written:
    """What the catalog keeps of a file."""

    layer: int
    nbytes: int
    header: bytes
    checksums: bytes


@lru_cache(maxsize=1)
def _madvise() -> Any:
    try:
        call = ctypes.CDLL(None).madvise
    except (AttributeError, OSError):
        return None
    call.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return call


def read_ahead(address: int, size: int) -> None:
    """Ask the system to read mapped pages ahead, without the interpreter's lock, which ``mmap.madvise`` keeps."""
    call = _madvise()
    if call is not None:
        call(address, size, mmap.MADV_WILLNEED)


def _pad(size: int) -> int:
    return -size % BLOCK


def file_bytes(sources: Mapping[str, Source]) -> int:
    """About how long the file of these tensors will be."""
    data = sum(source.nbytes for source in sources.values())
    return data + data // BLOCK * 8 + 4 * BLOCK


def _bytes_of(tensor: Tensor) -> np.ndarray:
    return tensor.reshape(-1).view(torch.uint8).numpy()


def _header(sources: Mapping[str, Source], metadata: Mapping[str, str], blocks: int, padding: int, gap: int) -> bytes:
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    at = 0

    def add(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        nonlocal at
        size = math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [at, at + size]}
        at += size

    for name, source in sources.items():
        add(name, source.dtype, source.shape)
        if name == "kv" and gap:
            add("gap", torch.uint8, (gap,))
    add("padding", torch.uint8, (padding,))
    add("checksums", torch.int64, (blocks,))
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * _pad(8 + len(text))
    return len(text).to_bytes(8, "little") + text


def write_vectors(fd: int, layer: int, sources: Mapping[str, Source], metadata: Mapping[str, str]) -> Written:
    """Write one layer's file; the caller makes it durable.

    Parameters
    ----------
    fd : int
        Of an empty file.
    layer : int
    sources : mapping of str to Source
        ``kv`` comes first, so that it begins at a page; the others by falling size of their elements, so that each is aligned.
    metadata : mapping of str to str

    Returns
    -------
    Written

    Raises
    ------
    StoreError
        If a source's pieces are not of its size.

    Notes
    -----
    One pass over the data: checksums are made of the chunk that is about to be written, in the calling thread, which may be any.
    """
    for name, source in sources.items():
        given = sum(piece.nbytes for piece in source.pieces)
        if given != source.nbytes:
            raise StoreError(
                f"layer {layer}: {name} {source.shape} takes {source.nbytes:,} bytes, but {given:,} were given. "
                "Nothing was stored; "
                "this is a defect, please report it."
            )
    order = sorted(sources, key=lambda name: (name != "kv", -sources[name].dtype.itemsize))
    sources = {name: sources[name] for name in order}
    # Vectors and what is beside them share no page: the one is registered with a device without the other.
    gap = _pad(sources["kv"].nbytes) if len(sources) > 1 and "kv" in sources else 0
    data = sum(source.nbytes for source in sources.values()) + gap
    padding = _pad(data)
    blocks = (data + padding) // BLOCK
    header = _header(sources, metadata, blocks, padding, gap)
    total = len(header) + data + padding + 8 * blocks
    # Room is taken before anything is written: a full disk shows here.
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(fd, 0, total)
    _write(fd, header)
    sums = np.empty(blocks, np.uint64)
    chunk = np.zeros(_CHUNK, np.uint8)
    filled, done = 0, 0

    def flush() -> None:
        nonlocal filled, done
        count = filled // BLOCK
        sums[done : done + count] = block_checksums(chunk[:filled], done, alone=True)
        _write(fd, chunk[:filled].data)
        done += count
        filled = 0

    for name, source in sources.items():
        zeros = [torch.zeros(gap, dtype=torch.uint8)] if name == "kv" and gap else []
        for piece in [*source.pieces, *zeros]:
            part = _bytes_of(piece)
            at = 0
            while at < part.size:
                take = min(part.size - at, _CHUNK - filled)
                chunk[filled : filled + take] = part[at : at + take]
                filled += take
                at += take
                if filled == _CHUNK:
                    flush()
    chunk[filled : filled + padding] = 0
    filled += padding
    flush()
    _write(fd, sums.data.cast("B"))
    return Written(layer, total, digest(header), digest(sums.data.cast("B")))


def _write(fd: int, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _read(fd: int, size: int, at: int) -> bytes:
    """Up to ``size`` bytes at a position, fewer only at the end of the file."""
    parts = []
    while size:
        part = os.pread(fd, size, at)
        if not part:
            break
        parts.append(part)
        size, at = size - len(part), at + len(part)
    return b"".join(parts)


def _unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name appears twice")
    return result


class VectorFile:
    """One layer's file, mapped read-only.

    Parameters
    ----------
    folder : int
        Descriptor of the folder it lies in.
    name : str
    expected : Written
        What the catalog says of it.
    label : str
        Context and layer, for messages.
    buffers : BufferManager, optional

    Attributes
    ----------
    tensors : dict of str to Tensor
        Views of the mapping. Never write to them: the mapping is read-only and the process would be killed.
    metadata : dict of str to str
    map : mmap
        The mapped file; tensors keep it alive.
    offset : int
        Byte where the tensors begin, a multiple of the page size.
    identity : tuple of int
        Device and inode.
    digest : bytes
        Of the checksums: files of one identity and digest hold the same bytes.

    Raises
    ------
    CorruptStoreError
        For another size or header than the catalog's, or a header that is not one of ours.

    Notes
    -----
    Opening reads the header. Blocks are verified the first time :meth:`check` is asked for them.

    The system ends a process (SIGBUS) that reads a mapped page behind the end of its file, or one that a failing disk does not
    give. Nothing in this package shortens a file. Where the mapping keeps a descriptor (before Python 3.13), a file that somebody
    cut is noticed before blocks are verified; blocks verified earlier, and cuts at that very moment, are not. To look at files
    that may be damaged use :meth:`damaged_blocks`, which reads instead of mapping.
    """

    def __init__(
        self, folder: int, name: str, expected: Written, label: str, buffers: BufferManager | None = None
    ) -> None:
        self.label, self._buffers = label, buffers
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
        try:
            state = os.fstat(fd)
            self.identity, self.digest = (state.st_dev, state.st_ino), expected.checksums
            if not stat.S_ISREG(state.st_mode) or state.st_size != expected.nbytes or expected.nbytes < 2 * BLOCK:
                raise self._damaged(f"the file {name} has {state.st_size:,} bytes instead of {expected.nbytes:,}")
            # Read, not mapped: a file that is cut short meanwhile is an error then, and not a signal.
            size = int.from_bytes(os.pread(fd, 8, 0), "little")
            if size > min(_MAX_HEADER, expected.nbytes - 8) or (8 + size) % BLOCK:
                raise self._damaged(f"the header claims {size:,} bytes")
            header = _read(fd, 8 + size, 0)
            if digest(header) != expected.header:
                raise self._damaged("the header is not the one that was stored")
            # Before Python 3.13 a mapping keeps a descriptor of its own.
            kwargs: dict[str, Any] = {"trackfd": False} if sys.version_info >= (3, 13) else {}
            self.map = mmap.mmap(fd, expected.nbytes, access=mmap.ACCESS_READ, **kwargs)
        finally:
            os.close(fd)
        self.offset = 8 + size
        self.tensors: dict[str, Tensor] = {}
        self.metadata: dict[str, str] = {}
        try:
            self._parse(header[8:], expected.nbytes - self.offset)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise self._damaged(f"the header cannot be used ({error})") from error
        self._expected, self._nbytes = expected.checksums, expected.nbytes
        self._tracked = not kwargs
        self._sums: np.ndarray | None = None
        sums = self.tensors.pop("checksums")
        self._checksums = sums.numpy().view(np.uint64)
        self._data = np.frombuffer(self.map, np.uint8, self._checksums.size * BLOCK, self.offset)
        self._words = self._data.view(np.uint64)
        self._verified = np.zeros(self._checksums.size, np.bool_)
        self._places = {name: (tensor.data_ptr(), tensor.nbytes) for name, tensor in self.tensors.items()}
        self._base = self._data.ctypes.data
        self._lock = threading.Lock()

    def _damaged(self, what: str) -> CorruptStoreError:
        return CorruptStoreError(
            f"{self.label}: {what}. The rest of the store is usable; delete this context and store it again, or restore the "
            "file from a copy."
        )

    def _parse(self, text: bytes, room: int) -> None:
        header = json.loads(text, object_pairs_hook=_unique_pairs)
        metadata = header.pop("__metadata__")
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("metadata must map names to text")
        self.metadata = metadata
        end = 0
        for name, entry in header.items():
            if not _NAME.fullmatch(name):
                raise ValueError(f"the name {name[:40]!r} is not allowed")
            dtype, shape, (start, stop) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
            if not all(type(n) is int and 0 <= n <= _INT64 for n in (*shape, start, stop)):
                raise ValueError(f"{name} has sizes that are not whole numbers")
            if start != end or stop > room or stop - start != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"{name} has the shape {shape} but the bytes {start} to {stop} of {room}")
            if start % dtype.itemsize:
                raise ValueError(f"{name} is not aligned")
            end = stop
            self.tensors[name] = self._tensor(dtype, shape, start)
        if end != room or "kv" not in self.tensors:
            raise ValueError(f"tensors cover {end} of {room} bytes")
        sums = self.tensors["checksums"]
        if sums.dtype != torch.int64 or sums.ndim != 1 or sums.numel() * (BLOCK + 8) != room:
            raise ValueError("the checksums do not cover the data")

    def _tensor(self, dtype: torch.dtype, shape: list[int], start: int) -> Tensor:
        count = math.prod(shape)
        if not count:
            return torch.empty(shape, dtype=dtype)
        data = np.frombuffer(self.map, np.uint8, count * dtype.itemsize, self.offset + start)
        with warnings.catch_warnings():
            # Torch has no read-only tensors and says so.
            warnings.filterwarnings("ignore", message=".*not writable.*")
            return torch.from_numpy(data).view(dtype).view(shape)

    @property
    def address(self) -> int:
        """Where the tensors begin in this process's memory, at a page."""
        return self._base

    @property
    def data_bytes(self) -> int:
        """Bytes of the tensors, whole pages."""
        return self._data.size

    def prefetch(self, name: str) -> None:
        """Ask the system to read a tensor ahead."""
        start, size = self._places.get(name, (0, 0))
        if size:
            start += self.offset - self._base
            page = start // mmap.PAGESIZE * mmap.PAGESIZE
            self.map.madvise(mmap.MADV_WILLNEED, page, start + size - page)

    def verify(self, blocks: range) -> None:
        """:meth:`check_blocks` for threads of one's own, and for pages that stay; asks the system to read the blocks ahead."""
        sums = self.check_sums()
        if blocks and not self._verified[blocks.start : blocks.stop].all():
            read_ahead(self._base + blocks.start * BLOCK, len(blocks) * BLOCK)
            bad = verify_range(self._words, sums, self._verified, blocks.start, blocks.stop)
            if bad >= 0:
                raise self._mismatch(int(bad))

    def scattered(self) -> None:
        """Say that rows of ``kv`` are about to be read here and there: a fault brings one page then, not those around it."""
        start, size = self._places["kv"]
        if size and hasattr(mmap, "MADV_RANDOM"):
            self.map.madvise(mmap.MADV_RANDOM, start - self._base + self.offset, size)

    def fetcher(
        self, ids: np.ndarray, counts: np.ndarray, firsts: np.ndarray, lasts: np.ndarray, origin: int, out: np.ndarray
    ) -> Callable[[int, int], None]:  # fmt: skip
        """What copies the rows of ``kv`` that some lists name, verified; for threads of one's own, which share the lists.

        Parameters
        ----------
        ids, counts, firsts, lasts, origin
            See :func:`~alaya_hf.kernels.cpu.fetch.fetch_rows`.
        out : ndarray ``[lists, cap, row bytes]`` uint8

        Returns
        -------
        callable
            Of the first list to do and the one to stop before; raises CorruptStoreError.

        Raises
        ------
        CorruptStoreError
        """
        sums = self.check_sums()
        heads, tokens = self.tensors["kv"].shape[:2]
        rows = out.view(np.uint64)
        assert self._places["kv"][0] == self._base

        def fetch(begin: int, end: int) -> None:
            bad = fetch_rows(
                self._words, sums, self._verified, ids, counts, firsts, lasts, origin, heads, tokens, rows.shape[-1], rows,
                begin, end,
            )  # fmt: skip
            if bad >= 0:
                raise self._mismatch(int(bad))

        return fetch

    def check(self, name: str, kind: str = "index") -> None:
        """Verify a whole tensor, once.

        Raises
        ------
        CorruptStoreError
            Naming context, layer and the damaged bytes.
        """
        start, size = self._places[name]
        if size:
            start -= self._base
            self.check_blocks(np.arange(start // BLOCK, (start + size - 1) // BLOCK + 1), kind)

    def check_rows(self, start: np.ndarray, size: int, kind: str = "data") -> None:
        """Verify equally long ranges of ``kv``: byte offsets of their starts within it, and their length."""
        first, last = start // BLOCK, (start + size - 1) // BLOCK
        if size > BLOCK:
            spans = [np.arange(a, b + 1) for a, b in zip(first.tolist(), last.tolist(), strict=True)]
            self.check_blocks(np.unique(np.concatenate(spans)), kind)
        elif self._buffers is not None or not (self._verified[first].all() and self._verified[last].all()):
            self.check_blocks(np.unique(np.concatenate([first, last])), kind)

    def blocks_of(self, name: str, start: int = 0, size: int | None = None) -> range:
        """Numbers of the blocks that a byte range of a tensor lies in."""
        at, nbytes = self._places[name]
        first = at - self._base + start
        last = first + (nbytes - start if size is None else size)
        return range(first // BLOCK, -(-last // BLOCK) if last > first else first // BLOCK)

    def check_blocks(self, blocks: np.ndarray, kind: str) -> None:
        """Verify blocks by number (int64, ascending), those that were not verified before."""
        if not blocks.size:
            return
        sums = self.check_sums()
        if self._buffers is not None:
            self._buffers.touch(self, kind, np.unique((blocks * BLOCK + self.offset) // FRAME).tolist())
        new = blocks[~self._verified[blocks]]
        if new.size:
            bad = first_damaged(self._data, new, sums)
            if bad >= 0:
                raise self._mismatch(bad)
            self._verified[new] = True

    def check_sums(self) -> np.ndarray:
        """The checksums, themselves verified once; that nobody cut the file is looked at each time.

        Raises
        ------
        CorruptStoreError
        """
        if self._tracked and self.map.size() != self._nbytes:
            raise self._damaged(f"the file was cut to {self.map.size():,} of {self._nbytes:,} bytes while it was open")
        with self._lock:
            if self._sums is None:
                if digest(self._checksums.data.cast("B")) != self._expected:
                    raise self._damaged("the checksums are not the ones that were stored")
                self._sums = self._checksums
            return self._sums

    def _mismatch(self, block: int) -> CorruptStoreError:
        at = self.offset + block * BLOCK
        return self._damaged(f"bytes {at:,} to {at + BLOCK:,} do not match their checksum")

    def damaged_blocks(self, folder: int, name: str) -> Iterator[str]:
        """Read everything again, from the file and not through the mapping, and say what is wrong, for a report.

        Parameters
        ----------
        folder : int
            Descriptor of the folder it lies in.
        name : str

        Notes
        -----
        A file that is short, or that the disk cannot read, is a finding. Reads 1 MiB at a time.
        """
        try:
            fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
            try:
                self._check_file(fd)
            finally:
                os.close(fd)
        except CorruptStoreError as error:
            yield str(error)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            yield str(self._damaged(f"the file cannot be read ({error.strerror})"))

    def _check_file(self, fd: int) -> None:
        count = self._checksums.size
        end = self.offset + count * BLOCK
        tail = _read(fd, 8 * count, end)
        if len(tail) != 8 * count:
            raise self._damaged(f"the file ends before its {self._nbytes:,} bytes")
        if digest(tail) != self._expected:
            raise self._damaged("the checksums are not the ones that were stored")
        sums = np.frombuffer(tail, np.uint64)
        step = FRAME // BLOCK
        for first in range(0, count, step):
            last = min(first + step, count)
            data = _read(fd, (last - first) * BLOCK, self.offset + first * BLOCK)
            if len(data) != (last - first) * BLOCK:
                raise self._damaged(f"the file ends before its {self._nbytes:,} bytes")
            wrong = np.flatnonzero(block_checksums(np.frombuffer(data, np.uint8), first) != sums[first:last])
            if wrong.size:
                raise self._mismatch(first + int(wrong[0]))

    def release(self, start: int, stop: int) -> None:
        """See :class:`~alaya_hf.storage.db.buffer_manager.Evictable`."""
        stop = min(stop, len(self.map))
        first, last = max(0, start - self.offset) // BLOCK, max(0, -(-(stop - self.offset) // BLOCK))
        self._verified[first:last] = False
        self.map.madvise(mmap.MADV_DONTNEED, start, stop - start)
