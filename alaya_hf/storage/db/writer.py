"""Writing a segment: aside, made durable, then given its name. Nothing is visible before the catalog says so."""

from __future__ import annotations

import os
import secrets
import shutil
import threading
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from alaya_hf.storage.db.catalog import NewSegment
from alaya_hf.storage.db.folder import Folder, writing
from alaya_hf.storage.db.vector_file import Source, Written, write_vectors

_WRITERS = 4


def layer_name(layer: int) -> str:
    """File name of a layer."""
    return f"layer-{layer:04d}.safetensors"


def new_id() -> str:
    """Of a segment, unpredictable."""
    return secrets.token_hex(16)


class SegmentWriter:
    """Writes the files of one segment; a context manager that removes what was not published.

    Parameters
    ----------
    folder : Folder
        Held by :meth:`Folder.writer` meanwhile.
    segment : str
    start, tokens : int
        Position in the context, and how many tokens.
    metadata : mapping of str to str
        For every file, beside what :meth:`write` adds.
    """

    def __init__(self, folder: Folder, segment: str, start: int, tokens: int, metadata: Mapping[str, str]) -> None:
        self.folder, self.segment, self.start, self.tokens = folder, segment, start, tokens
        self._metadata = dict(metadata)
        self._files: list[Written | Future[Written]] = []
        self._dtype = ""
        self._published = False
        # The disk takes some files while the next are made: no more of them, or what they are made of would pile up.
        allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        count = max(1, min(_WRITERS, allowed - 1))
        self._pool = ThreadPoolExecutor(count, thread_name_prefix="alaya-write")
        self._free = threading.Semaphore(count + 1)
        self._durable: list[Future[None]] = []
        with writing(folder.path):
            self._staged: Path = folder.new_staging(segment)

    def __enter__(self) -> SegmentWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        if not self._published:
            shutil.rmtree(self._staged, ignore_errors=True)

    def write(self, layer: int, sources: Mapping[str, Source], metadata: Mapping[str, str]) -> None:
        """Write one layer, beside others: the sources stay as they are until :meth:`publish`.

        Raises
        ------
        DiskFullError, ReadOnlyStoreError
            Also of layers given before.
        """
        about = {**self._metadata, **metadata, "segment": self.segment, "layer": str(layer)}
        self._dtype = str(sources["kv"].dtype).removeprefix("torch.")
        for before in self._files:
            if isinstance(before, Future) and before.done():
                before.result()
        self._free.acquire()
        self._files.append(self._pool.submit(self._write, layer, sources, about))

    def _write(self, layer: int, sources: Mapping[str, Source], about: Mapping[str, str]) -> Written:
        try:
            with writing(self.folder.path):
                path = self._staged / layer_name(layer)
                fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
                try:
                    written = write_vectors(fd, layer, sources, about)
                    os.fsync(fd)
                finally:
                    os.close(fd)
            return written
        finally:
            self._free.release()

    def take(self, file: Written, chunks: Iterable[bytes]) -> None:
        """Write a layer as it comes from elsewhere, bytes and digests as given."""
        with writing(self.folder.path):
            path = self._staged / layer_name(file.layer)
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                for chunk in chunks:
                    view = memoryview(chunk)
                    while view:
                        view = view[os.write(fd, view) :]
            except BaseException:
                os.close(fd)
                raise
        self._files.append(file)
        self._durable.append(self._pool.submit(_make_durable, fd))

    @property
    def staged(self) -> Path:
        """Where the files are until they are published."""
        return self._staged

    def publish(self, dtype: str | None = None) -> NewSegment:
        """Wait for the disk and give the files their name; what remains is the catalog's commit.

        Raises
        ------
        DiskFullError
        """
        files = [file.result() if isinstance(file, Future) else file for file in self._files]
        with writing(self.folder.path):
            for durable in self._durable:
                durable.result()
            self.folder.publish(self._staged, self.segment)
        self._published = True
        return NewSegment(self.segment, self.start, self.tokens, dtype or self._dtype, files)


def _make_durable(fd: int) -> None:
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
