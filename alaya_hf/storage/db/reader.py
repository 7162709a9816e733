"""Opening stored prefixes: mapped files, and the runs of tokens that a layer attends to."""

from __future__ import annotations

import errno
import os
import threading
from dataclasses import dataclass
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from alaya_hf.errors import CorruptStoreError, StoreError
from alaya_hf.storage.db.buffer_manager import BufferManager
from alaya_hf.storage.db.catalog import Catalog, Chain, Link
from alaya_hf.storage.db.folder import Folder
from alaya_hf.storage.db.mapped import MappedSegment, copied
from alaya_hf.storage.db.parts import Part, read_parts
from alaya_hf.storage.db.vector_file import VectorFile
from alaya_hf.storage.db.writer import layer_name
from alaya_hf.storage.segment import Segment
from alaya_hf.storage.store import Piece

_COPIED = 4096  # tokens without an index that are copied into one segment rather than searched run by run


_LOST = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)


class SegmentGone(Exception):
    """A segment was deleted between finding and opening it; look again."""


@dataclass
class _Run:
    """Tokens ``start`` to ``stop`` of a context, which are ``at`` ... of a file."""

    start: int
    stop: int
    file: VectorFile
    at: int
    part: Part | None = None

    def read(self, start: int, stop: int) -> Tensor:
        first = self.at + start - self.start
        return MappedSegment(self.file, first, first + stop - start).read()


@dataclass(frozen=True)
class FileRun:
    """Tokens ``start`` to ``stop`` of a context, which are the first ones of a file."""

    start: int
    stop: int
    file: VectorFile


def lost(error: OSError) -> bool:
    """Whether a file is not there or not one of ours, rather than this process unable to open it."""
    return error.errno in _LOST


def refused(label: str, error: OSError) -> StoreError:
    """For a file that is there, as far as one can tell: out of descriptors or memory, no permission, a failing disk."""
    return StoreError(
        f"{label}: a file cannot be opened now ({error.strerror}). This says nothing about the stored context: see to the cause "
        "and try again."
    )


class StoredLayer:
    """One layer of a stored prefix.

    Parameters
    ----------
    runs : list of _Run
        Cover the prefix in order; those with a part had an index of their own.
    """

    def __init__(self, runs: list[_Run]) -> None:
        self._runs = runs
        kv = runs[0].file.tensors["kv"]
        self.kv_heads, self.head_dim, self.dtype = kv.shape[0], kv.shape[3], kv.dtype
        self.tokens = runs[-1].stop

    def read(self, start: int, stop: int) -> Tensor:
        """Keys and values of some tokens, a verified copy: ``[kv_heads, stop - start, 2, head_dim]``."""
        parts = [
            run.read(max(start, run.start), min(stop, run.stop))
            for run in self._runs
            if run.start < stop and start < run.stop
        ]
        if not parts:
            return torch.empty(self.kv_heads, 0, 2, self.head_dim, dtype=self.dtype)
        return torch.cat(parts, dim=1)

    def files(self) -> list[FileRun]:
        """The files that the prefix lies in, in order."""
        found: list[FileRun] = []
        for run in self._runs:
            if found and found[-1].file is run.file:
                found[-1] = FileRun(found[-1].start, run.stop, run.file)
            else:
                found.append(FileRun(run.start, run.stop, run.file))
        return found

    def settled(self, most: int) -> int:
        """Where the last indexed run ends, if at most ``most`` tokens follow it; else -1."""
        ends = [
            run.stop for run in self._runs if run.part is not None and run.at + run.stop - run.start == run.part.stop
        ]
        return ends[-1] if ends and self.tokens - ends[-1] <= most else -1

    def pieces(self, start: int, stop: int) -> list[Piece]:
        """Tokens ``start`` to ``stop`` to be attended where they lie.

        Runs that begin with their index keep it, also where only their first tokens are wanted; short runs without one
        are copied together.
        """
        pieces: list[Piece] = []
        loose: list[_Run] = []

        def settle() -> None:
            if not loose:
                return
            if sum(run.stop - run.start for run in loose) <= _COPIED:
                segment: Segment = copied([run.read(run.start, run.stop) for run in loose])
                pieces.append(Piece(segment, segment.used))
            else:
                for run in loose:
                    segment = MappedSegment(run.file, run.at, run.at + run.stop - run.start)
                    pieces.append(Piece(segment, segment.used))
            loose.clear()

        for run in self._runs:
            first, last = max(start, run.start), min(stop, run.stop)
            if first >= last:
                continue
            if run.part is not None and first == run.start:
                settle()
                segment = MappedSegment(run.file, run.part.start, run.part.stop, run.part)
                pieces.append(Piece(segment, last - first))
            else:
                loose.append(_Run(first, last, run.file, run.at + first - run.start))
        settle()
        return pieces


class Reader:
    """Opens segments, once per process.

    Parameters
    ----------
    folder : Folder
    catalog : Catalog
    buffers : BufferManager, optional
    """

    def __init__(self, folder: Folder, catalog: Catalog, buffers: BufferManager | None = None) -> None:
        self.folder, self.catalog, self.buffers = folder, catalog, buffers
        self._open: WeakValueDictionary[tuple[str, int], VectorFile] = WeakValueDictionary()
        self._lock = threading.Lock()

    def files(self, segment: str, label: str) -> list[VectorFile]:
        """All layers of a segment.

        Raises
        ------
        SegmentGone
            If the catalog does not know it any more.
        CorruptStoreError
        StoreError
            If the system refuses to open it, for want of descriptors, memory or permission.
        """
        with self._lock:
            expected = self.catalog.files(segment)
            if not expected:
                raise SegmentGone(segment)
            held = [self._open.get((segment, file.layer)) for file in expected]
            files = [file for file in held if file is not None]
            if len(files) == len(expected):
                return files
            try:
                folder = self.folder.open_segment(segment)
            except OSError as error:
                raise self._gone(segment, label, error) from error
            files = []
            try:
                for number, file in enumerate(expected):
                    where = f"{label}, layer {file.layer}"
                    if file.layer != number:
                        raise CorruptStoreError(
                            f"{where}: the catalog has no file of layer {number}. Delete the context."
                        )
                    try:
                        opened = VectorFile(folder, layer_name(number), file, where, self.buffers)
                    except OSError as error:
                        raise self._gone(segment, where, error) from error
                    if opened.metadata.get("segment") != segment or opened.metadata.get("layer") != str(number):
                        raise CorruptStoreError(
                            f"{where}: the file belongs to segment {opened.metadata.get('segment')!r}. Delete the context and "
                            "store it again."
                        )
                    self._open[segment, number] = opened
                    files.append(opened)
            finally:
                os.close(folder)
            return files

    def _gone(self, segment: str, label: str, error: OSError) -> Exception:
        if not lost(error):
            return refused(label, error)
        if not self.catalog.files(segment):
            return SegmentGone(segment)
        return CorruptStoreError(
            f"{label}: a file of segment {segment} cannot be opened ({error.strerror}). The rest of the store is usable; "
            "restore the file from a copy, or delete the context and store it again."
        )

    def layers(self, chain: Chain, label: str) -> list[StoredLayer]:
        """The layers of a prefix.

        Parameters
        ----------
        chain : Chain
        label : str
            The context, for messages.
        """
        opened = [(link, self.files(link.segment, label)) for link in chain.links]
        count = len(opened[0][1])
        layers = []
        for number in range(count):
            runs: list[_Run] = []
            for link, files in opened:
                if len(files) != count:
                    raise CorruptStoreError(
                        f"{label}: segment {link.segment} has {len(files)} layers instead of {count}. Delete the context."
                    )
                runs += _runs(link, files[number])
            layers.append(StoredLayer(runs))
        return layers


def _runs(link: Link, file: VectorFile) -> list[_Run]:
    kv = file.tensors["kv"]
    try:
        if kv.ndim != 4 or kv.shape[2] != 2 or not kv.is_floating_point() or kv.shape[1] < link.length:
            raise ValueError(f"keys and values are {kv.dtype} {tuple(kv.shape)}")
        if (int(file.metadata["start"]), int(file.metadata["tokens"])) != (link.start, kv.shape[1]):
            raise ValueError("it holds other tokens than the catalog says")
        parts = read_parts(file.metadata["parts"], kv.shape[1])
    except (ValueError, KeyError, TypeError) as error:
        raise file._damaged(f"the file cannot be used ({error})") from error
    runs, at = [], 0
    for part in [*parts, None]:
        end = link.length if part is None else min(part.start, link.length)
        if at < end:
            runs.append(_Run(link.start + at, link.start + end, file, at))
            at = end
        if part is not None and part.start < link.length:
            stop = min(part.stop, link.length)
            runs.append(_Run(link.start + part.start, link.start + stop, file, part.start, part))
            at = stop
    return runs
