"""Local disk over a remote store: what is stored goes there too, what is missing here is fetched from there.

A fetched context becomes a local one, through the same writer and the same catalog: its digests are checked before it is
committed, and its token ids are compared like any other's.
"""

from __future__ import annotations

import json
import os
import re
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, TimeoutError
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from alaya_hf.errors import CorruptStoreError
from alaya_hf.storage.db import hashing
from alaya_hf.storage.db.catalog import Catalog, Chain, Link, NewSegment
from alaya_hf.storage.db.fingerprint import digest_of
from alaya_hf.storage.db.folder import Folder
from alaya_hf.storage.db.remote.base import RemoteStore
from alaya_hf.storage.db.vector_file import VectorFile, Written
from alaya_hf.storage.db.writer import SegmentWriter, layer_name

T = TypeVar("T")

MARK_BLOCKS = 16
"""A prefix is announced every so many blocks, and at its last whole block."""
CHUNK = 1 << 24
"""Bytes per value."""
_ID = re.compile(r"[0-9a-f]{32}")
_MAX_LAYERS = 4096


class RemoteTier:
    """Shares the segments of a local store.

    Parameters
    ----------
    remote : RemoteStore
    folder : Folder
    catalog : Catalog
    timeout : float
        Seconds that a look-up may take.
    transfer_timeout : float
        Seconds that a segment may take.
    pause : float
        Seconds to do without the remote store after it failed.

    Notes
    -----
    Calls run in a thread of their own, so that a store that hangs costs ``timeout`` once per ``pause``. Failures become
    warnings: local contexts, or none, are a slower right answer.
    """

    def __init__(
        self,
        remote: RemoteStore,
        folder: Folder,
        catalog: Catalog,
        timeout: float = 5.0,
        transfer_timeout: float = 300.0,
        pause: float = 60.0,
    ) -> None:
        self.remote, self.folder, self.catalog = remote, folder, catalog
        self.timeout, self.transfer_timeout, self.pause = timeout, transfer_timeout, pause
        self._until = 0.0

    def close(self) -> None:
        """Close the remote store."""
        self._guarded(self.timeout, self.remote.close, None, "closing it")

    def _guarded(self, timeout: float, work: Callable[[], T], otherwise: T, what: str) -> T:
        if time.monotonic() < self._until:
            return otherwise
        result: Future[T] = Future()

        def run() -> None:
            try:
                result.set_result(work())
            except BaseException as error:
                result.set_exception(error)

        # A daemon: a store that never answers must not keep the process from ending.
        threading.Thread(target=run, name="alaya-remote", daemon=True).start()
        try:
            return result.result(timeout)
        except CorruptStoreError as error:
            # Its content is bad, the store itself answers.
            warnings.warn(f"the remote store: {error} It is not used.", RuntimeWarning, stacklevel=4)
            return otherwise
        except (Exception, TimeoutError) as error:
            self._until = time.monotonic() + self.pause
            said = (
                f"no answer within {timeout:g} s"
                if isinstance(error, TimeoutError)
                else f"{type(error).__name__}: {error}"
            )
            warnings.warn(
                f"the remote store failed in {what} ({said}); going on with the local store for {self.pause:g} s.",
                RuntimeWarning,
                stacklevel=4,
            )
            return otherwise

    def _marks(self, namespace: str, fields: Mapping[str, str], ids: np.ndarray) -> list[tuple[int, str]]:
        """Positions of a prompt that a stored prefix may be announced at, and their names."""
        hashes = hashing.chain(ids, self.catalog.block, namespace)
        model = digest_of(fields).hex()
        return [((n + 1) * self.catalog.block, f"marks/{model}/{value.hex()}") for n, value in enumerate(hashes)]

    # Storing ----------------------------------------------------------------------------------------------------------

    def push(self, namespace: str, fields: Mapping[str, str], ids: np.ndarray, chain: Chain) -> bool:
        """Copy a stored prefix to the remote store, as far as it is not there; whether it is there now."""

        def work() -> bool:
            parent: str | None = None
            for link in chain.links:
                if not self._push_segment(link.segment, parent):
                    return False
                parent = link.segment
            marks = self._marks(namespace, fields, ids[: chain.tokens])
            for number, (stop, key) in enumerate(marks):
                if (number + 1) % MARK_BLOCKS == 0 or number + 1 == len(marks):
                    holder = next(link for link in chain.links if link.start < stop <= link.start + link.length)
                    self.remote.put(key, json.dumps({"segment": holder.segment}).encode())
            return True

        return self._guarded(self.transfer_timeout, work, False, "storing a context")

    def _push_segment(self, segment: str, parent: str | None) -> bool:
        key = f"segments/{segment}/manifest"
        if self.remote.exists(key):
            return True
        row = self.catalog.parts_of(segment)
        files = self.catalog.files(segment)
        if row is None or not files:
            return False  # deleted meanwhile
        folder = self.folder.segment(segment)
        for file in files:
            for number, chunk in enumerate(_chunks(folder / layer_name(file.layer))):
                self.remote.put(f"segments/{segment}/{file.layer:04d}/{number:06d}", chunk)
        ids = row["ids"]
        assert isinstance(ids, bytes)
        manifest = {
            "parent": parent,
            "start": row["start"],
            "tokens": row["tokens"],
            "dtype": row["dtype"],
            "block": self.catalog.block,
            "files": [[f.layer, f.nbytes, f.header.hex(), f.checksums.hex()] for f in files],
        }
        for number in range(0, len(ids), CHUNK):
            self.remote.put(f"segments/{segment}/ids/{number // CHUNK:06d}", ids[number : number + CHUNK])
        # Last: what has a manifest is whole.
        self.remote.put(key, json.dumps(manifest).encode())
        return True

    # Fetching ---------------------------------------------------------------------------------------------------------

    def fetch(self, namespace: str, fields: Mapping[str, str], ids: np.ndarray, local: Chain) -> bool:
        """Bring a longer stored prefix of a prompt here than there is; whether there was one."""
        marks = [mark for mark in self._marks(namespace, fields, ids) if mark[0] > local.tokens]
        if not marks or self.catalog.read_only:
            return False
        found = self._guarded(self.timeout, lambda: self._find(marks, local.tokens), None, "looking for a context")
        if found is None:
            return False
        return self._guarded(
            self.transfer_timeout, lambda: self._pull(namespace, fields, ids, found), False, "fetching a context"
        )

    def _find(self, marks: list[tuple[int, str]], local: int) -> tuple[int, str] | None:
        """The longest announced prefix: every sixteenth block by bisection, then the blocks behind it."""
        block = self.catalog.block
        coarse = [mark for mark in marks if (mark[0] // block) % MARK_BLOCKS == 0]
        low, high = 0, len(coarse)
        while low < high:
            middle = (low + high + 1) // 2
            if self.remote.exists(coarse[middle - 1][1]):
                low = middle
            else:
                high = middle - 1
        step = MARK_BLOCKS * block
        after = coarse[low - 1][0] if low else local // step * step
        # The last whole block of a prefix is announced too; between two marks there is at most that.
        near = [mark for mark in marks if after < mark[0] < after + step + block]
        best = coarse[low - 1] if low else None
        for mark in reversed(near):
            if self.remote.exists(mark[1]):
                best = mark
                break
        if best is None:
            return None
        value = self.remote.get(best[1])
        if value is None:
            return None
        segment = json.loads(value).get("segment")
        if not isinstance(segment, str) or not _ID.fullmatch(segment):
            raise CorruptStoreError(f"a mark names a segment {segment!r}, which is none.")
        return best[0], segment

    def _pull(self, namespace: str, fields: Mapping[str, str], ids: np.ndarray, found: tuple[int, str]) -> bool:
        stop, segment = found
        manifests: list[tuple[str, dict[str, Any], bytes]] = []
        at: str | None = segment
        end = stop
        while at is not None:
            value = self.remote.get(f"segments/{at}/manifest")
            if value is None:
                return False
            manifest = _manifest(value, at)
            own = b"".join(self._pieces(f"segments/{at}/ids", 4 * manifest["tokens"]))
            known = np.frombuffer(own, np.int32)
            if not manifest["start"] < end <= manifest["start"] + manifest["tokens"]:
                raise CorruptStoreError(f"segment {at} does not hold token {end - 1}.")
            length = end - manifest["start"]
            if not np.array_equal(known[:length], ids[manifest["start"] : end]):
                return False  # a collision of hashes
            manifests.insert(0, (at, manifest, own))
            at, end = manifest["parent"], manifest["start"]
        if end != 0:
            raise CorruptStoreError(f"segment {manifests[0][0]} begins at token {end} without a parent.")
        links: list[Link] = []
        whole: list[np.ndarray] = []
        new: list[NewSegment] = []
        with self.folder.writer():
            try:
                held = self.catalog.known()
                for number, (name, manifest, own) in enumerate(manifests):
                    last = number + 1 == len(manifests)
                    length = manifest["tokens"] if last else manifests[number + 1][1]["start"] - manifest["start"]
                    whole.append(np.frombuffer(own, np.int32)[:length])
                    if name in held and not new:
                        links.append(Link(name, manifest["start"], length))
                        continue
                    if not last and length < manifest["tokens"]:
                        # Its hashes must be those of its own tokens, which the ones that go on here are not.
                        self._adopt(namespace, fields, Chain(tuple(links)), new, whole[:-1], name, manifest, own)
                        links += [Link(s.id, s.start, s.tokens) for s in new]
                        links[-1] = Link(name, manifest["start"], length)
                        new = []
                        continue
                    new.append(self._receive(name, manifest))
                self.catalog.commit(namespace, fields, np.concatenate(whole), Chain(tuple(links)), new, None)
            except LookupError:
                # What it continues was deleted here meanwhile.
                for segment_of in new:
                    self.folder.remove_segment(segment_of.id)
                return False
            except BaseException:
                for segment_of in new:
                    self.folder.remove_segment(segment_of.id)
                raise
        return True

    def _adopt(
        self,
        namespace: str,
        fields: Mapping[str, str],
        base: Chain,
        waiting: list[NewSegment],
        before: list[np.ndarray],
        name: str,
        manifest: dict[str, Any],
        own: bytes,
    ) -> None:
        """Commit a segment that others branch off, as the context it was."""
        waiting.append(self._receive(name, manifest))
        ids = np.concatenate([*before, np.frombuffer(own, np.int32)])
        self.catalog.commit(namespace, fields, ids, base, waiting, None)

    def _receive(self, segment: str, manifest: dict[str, Any]) -> NewSegment:
        """Write a segment's files and verify every block of them."""
        with SegmentWriter(self.folder, segment, manifest["start"], manifest["tokens"], {}) as writer:
            for file in manifest["files"]:
                writer.take(file, self._pieces(f"segments/{segment}/{file.layer:04d}", file.nbytes))
            fd = os.open(writer.staged, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                for file in manifest["files"]:
                    label = f"a fetched context (segment {segment[:8]}), layer {file.layer}"
                    opened = VectorFile(fd, layer_name(file.layer), file, label)
                    for problem in opened.damaged_blocks():
                        raise CorruptStoreError(problem)
                    about = opened.metadata
                    if (about.get("segment"), about.get("layer")) != (segment, str(file.layer)):
                        raise CorruptStoreError(f"{label}: the file belongs to segment {about.get('segment')!r}.")
            finally:
                os.close(fd)
            return writer.publish(manifest["dtype"])

    def _pieces(self, prefix: str, nbytes: int) -> Iterator[bytes]:
        for number in range(-(-nbytes // CHUNK)):
            piece = self.remote.get(f"{prefix}/{number:06d}")
            size = min(CHUNK, nbytes - number * CHUNK)
            if piece is None or len(piece) != size:
                got = "nothing" if piece is None else f"{len(piece):,} bytes"
                raise CorruptStoreError(f"{prefix}/{number:06d} has {got} instead of {size:,}.")
            yield piece


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            yield chunk


def _manifest(value: bytes, segment: str) -> dict[str, Any]:
    """A manifest, after a look at every value: it comes from another machine."""
    try:
        data = json.loads(value)
        parent, start, tokens = data["parent"], data["start"], data["tokens"]
        files = [Written(int(n), int(size), bytes.fromhex(h), bytes.fromhex(c)) for n, size, h, c in data["files"]]
        good = (
            (parent is None or bool(_ID.fullmatch(parent)))
            and type(start) is int
            and type(tokens) is int
            and start >= 0
            and 0 < tokens < 1 << 31
            and data["dtype"] in ("float32", "float16", "bfloat16")
            and 0 < len(files) <= _MAX_LAYERS
            and [file.layer for file in files] == list(range(len(files)))
            and all(0 < file.nbytes < 1 << 48 for file in files)
        )
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptStoreError(f"the manifest of segment {segment} cannot be read ({error}).") from error
    if not good:
        raise CorruptStoreError(f"the manifest of segment {segment} says what cannot be.")
    return {"parent": parent, "start": start, "tokens": tokens, "dtype": data["dtype"], "files": files}
