"""Writing a segment: aside, made durable, then given its name. Nothing is visible before the catalog says so."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from alaya_hf.storage.db.catalog import NewSegment
from alaya_hf.storage.db.folder import Folder, writing
from alaya_hf.storage.db.vector_file import Source, Written, write_vectors


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
        self._files: list[Written] = []
        self._dtype = ""
        self._published = False
        # The disk takes one file while the next is made.
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="alaya-fsync")
        self._durable: list[Future[None]] = []
        with writing(folder.path):
            self._staged: Path = folder.new_staging(segment)

    def __enter__(self) -> SegmentWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(wait=True)
        if not self._published:
            shutil.rmtree(self._staged, ignore_errors=True)

    def write(self, layer: int, sources: Mapping[str, Source], metadata: Mapping[str, str]) -> None:
        """Write one layer.

        Raises
        ------
        DiskFullError, ReadOnlyStoreError
        """
        about = {**self._metadata, **metadata, "segment": self.segment, "layer": str(layer)}
        with writing(self.folder.path):
            path = self._staged / layer_name(layer)
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                self._files.append(write_vectors(fd, layer, sources, about))
            except BaseException:
                os.close(fd)
                raise
        self._dtype = str(sources["kv"].dtype).removeprefix("torch.")
        self._durable.append(self._pool.submit(_make_durable, fd))

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
        with writing(self.folder.path):
            for written in self._durable:
                written.result()
            self.folder.publish(self._staged, self.segment)
        self._published = True
        return NewSegment(self.segment, self.start, self.tokens, dtype or self._dtype, self._files)


def _make_durable(fd: int) -> None:
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
