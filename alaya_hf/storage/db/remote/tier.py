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

from alaya_hf.errors import CorruptStoreError, StoreError
from alaya_hf.storage.db import hashing
from alaya_hf.storage.db.catalog import Catalog, Chain, Link, NewSegment
from alaya_hf.storage.db.fingerprint import digest_of
from alaya_hf.storage.db.folder import Folder
from alaya_hf.storage.db.parts import read_parts
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


class _RemoteFailed(Exception):
    """The remote store's own failure, told apart from this machine's."""


class _Calls:
    """The calls to a remote store, whose exceptions say that they are its own."""

    def __init__(self, remote: RemoteStore) -> None:
        self._remote = remote

    @staticmethod
    def _ask(call: Callable[..., T], *args: Any) -> T:
        try:
            return call(*args)
        except Exception as error:
            raise _RemoteFailed(f"{type(error).__name__}: {error}") from error

    def put(self, key: str, value: bytes) -> None:
        self._ask(self._remote.put, key, value)

    def get(self, key: str) -> bytes | None:
        return self._ask(self._remote.get, key)

    def exists(self, key: str) -> bool:
        return self._ask(self._remote.exists, key)

    def close(self) -> None:
        self._ask(self._remote.close)


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
    warnings: local contexts, or none, are a slower right answer. What fails on this machine (its disk, its catalog) is a warning
    too, but the remote store is asked again.

    A remote store keeps what it was given: deleting a context removes it from the local store only, and the next prompt that
    begins like it fetches it again.
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
        self.remote, self.folder, self.catalog = _Calls(remote), folder, catalog
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
        except (StoreError, OSError) as error:
            # A time-out of the future, which is an OSError since Python 3.11, is one only while there is no result.
            if not isinstance(error, TimeoutError) or result.done():
                warnings.warn(
                    f"this machine failed in {what} ({type(error).__name__}: {error}); going on with what is stored here.",
                    RuntimeWarning,
                    stacklevel=4,
                )
                return otherwise
            return self._failed(what, f"no answer within {timeout:g} s", otherwise)
        except TimeoutError:
            return self._failed(what, f"no answer within {timeout:g} s", otherwise)
        except Exception as error:
            said = str(error) if isinstance(error, _RemoteFailed) else f"{type(error).__name__}: {error}"
            return self._failed(what, said, otherwise)

    def _failed(self, what: str, said: str, otherwise: T) -> T:
        self._until = time.monotonic() + self.pause
        warnings.warn(
            f"the remote store failed in {what} ({said}); going on with the local store for {self.pause:g} s.",
            RuntimeWarning,
            stacklevel=5,
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

    def fetch(
        self,
        namespace: str,
        fields: Mapping[str, str],
        ids: np.ndarray,
        local: Chain,
        shape: tuple[int, int | None] | None = None,
    ) -> bool:
        """Bring a longer stored prefix of a prompt here than there is; whether there was one.

        Parameters
        ----------
        namespace : str
        fields : mapping
            The model's fingerprint.
        ids : ndarray
            ``[n]`` int32, the prompt.
        local : Chain
            What is here of it.
        shape : (int, int or None), optional
            The model's layers, and KV heads of each if all have as many: content of other shapes is refused.
        """
        marks = [mark for mark in self._marks(namespace, fields, ids) if mark[0] > local.tokens]
        if not marks or self.catalog.read_only:
            return False
        found = self._guarded(self.timeout, lambda: self._find(marks, local.tokens), None, "looking for a context")
        if found is None:
            return False
        return self._guarded(
            self.transfer_timeout, lambda: self._pull(namespace, fields, ids, found, shape), False, "fetching a context"
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

    def _pull(
        self,
        namespace: str,
        fields: Mapping[str, str],
        ids: np.ndarray,
        found: tuple[int, str],
        shape: tuple[int, int | None] | None,
    ) -> bool:
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
            if shape is not None and len(manifest["files"]) != shape[0]:
                raise CorruptStoreError(
                    f"segment {at} has {len(manifest['files'])} layers, but the model has {shape[0]}."
                )
            manifests.insert(0, (at, manifest, own))
            at, end = manifest["parent"], manifest["start"]
        if end != 0:
            raise CorruptStoreError(f"segment {manifests[0][0]} begins at token {end} without a parent.")
        for name, _, _ in manifests:
            if not self._make_way(name):
                return False  # somebody else is storing, perhaps this very context
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
                        self._adopt(namespace, fields, Chain(tuple(links)), new, whole[:-1], name, manifest, own, shape)
                        links += [Link(s.id, s.start, s.tokens) for s in new]
                        links[-1] = Link(name, manifest["start"], length)
                        new = []
                        continue
                    new.append(self._receive(name, manifest, shape))
                self.catalog.commit(namespace, fields, np.concatenate(whole), Chain(tuple(links)), new, None)
            except LookupError:
                # What it continues was deleted here meanwhile.
                self._discard(new)
                return False
            except BaseException:
                self._discard(new)
                raise
        return True

    def _make_way(self, segment: str) -> bool:
        """Remove files that an interrupted fetch left under a segment's name; false if they may be somebody's work."""
        path = self.folder.segment(segment)
        if not os.path.lexists(path) or self.catalog.knows(segment):
            return True
        with self.folder.sweeper() as alone:
            if alone and not self.catalog.knows(segment):
                self.folder.remove_segment(segment)
        return not os.path.lexists(path) or self.catalog.knows(segment)

    def _discard(self, new: list[NewSegment]) -> None:
        """Remove the files of what was not committed."""
        for segment in new:
            if not self.catalog.knows(segment.id):
                self.folder.remove_segment(segment.id)

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
        shape: tuple[int, int | None] | None,
    ) -> None:
        """Commit a segment that others branch off, as the context it was."""
        waiting.append(self._receive(name, manifest, shape))
        ids = np.concatenate([*before, np.frombuffer(own, np.int32)])
        self.catalog.commit(namespace, fields, ids, base, waiting, None)

    def _receive(self, segment: str, manifest: dict[str, Any], shape: tuple[int, int | None] | None) -> NewSegment:
        """Write a segment's files, verify every block of them, and that they hold what the manifest says."""
        with SegmentWriter(self.folder, segment, manifest["start"], manifest["tokens"], {}) as writer:
            for file in manifest["files"]:
                writer.take(file, self._pieces(f"segments/{segment}/{file.layer:04d}", file.nbytes))
            fd = os.open(writer.staged, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                for file in manifest["files"]:
                    label = f"a fetched context (segment {segment[:8]}), layer {file.layer}"
                    opened = VectorFile(fd, layer_name(file.layer), file, label)
                    for problem in opened.damaged_blocks(fd, layer_name(file.layer)):
                        raise CorruptStoreError(problem)
                    _check_content(opened, manifest, shape)
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


def _check_content(file: VectorFile, manifest: dict[str, Any], shape: tuple[int, int | None] | None) -> None:
    """Refuse a fetched file, whole as it may be, that holds something else than its segment."""
    kv, tokens, about = file.tensors["kv"], manifest["tokens"], file.metadata
    try:
        given = (str(kv.dtype).removeprefix("torch."), int(about["start"]), int(about["tokens"]))
        read_parts(about["parts"], tokens)
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptStoreError(f"{file.label}: the header cannot be used ({error}).") from error
    heads = None if shape is None else shape[1]
    if (
        given != (manifest["dtype"], manifest["start"], tokens)
        or kv.ndim != 4
        or kv.shape[1:3] != (tokens, 2)
        or (heads is not None and kv.shape[0] != heads)
    ):
        raise CorruptStoreError(
            f"{file.label}: keys and values are {given[0]} {tuple(kv.shape)} from token {given[1]} on, instead of "
            f"{manifest['dtype']} [{'heads' if heads is None else heads}, {tokens}, 2, head_dim] from {manifest['start']} on."
        )


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
