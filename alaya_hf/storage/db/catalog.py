"""The catalog: which segments and contexts exist, in SQLite.

Segments form a tree: each continues a prefix of its parent, or nothing. A context is a place in that tree, so contexts
that branch from a common prefix share its segments. A segment lives while a context or another segment refers to it.
"""

from __future__ import annotations

import json
import os
import secrets
import sqlite3
import threading
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from alaya_hf.errors import (
    ContextExistsError,
    CorruptStoreError,
    ReadOnlyStoreError,
    StoreError,
    UnknownContextError,
)
from alaya_hf.storage.db import hashing
from alaya_hf.storage.db.fingerprint import differences, digest_of
from alaya_hf.storage.db.folder import writing
from alaya_hf.storage.db.vector_file import Written

VERSION = 2
_SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE spaces (
    id INTEGER PRIMARY KEY, namespace TEXT NOT NULL, digest BLOB NOT NULL, fields TEXT NOT NULL, UNIQUE (namespace, digest));
CREATE TABLE segments (
    id TEXT PRIMARY KEY, space INTEGER NOT NULL, parent TEXT, start INTEGER NOT NULL, tokens INTEGER NOT NULL,
    live INTEGER NOT NULL, first BLOB NOT NULL, digest BLOB NOT NULL, bytes INTEGER NOT NULL, dtype TEXT NOT NULL,
    created REAL NOT NULL) WITHOUT ROWID;
CREATE TABLE tokens (segment TEXT PRIMARY KEY, ids BLOB NOT NULL) WITHOUT ROWID;
CREATE INDEX roots ON segments (space, parent);
CREATE INDEX children ON segments (parent, start);
CREATE TABLE files (
    segment TEXT NOT NULL, layer INTEGER NOT NULL, bytes INTEGER NOT NULL, header BLOB NOT NULL, checksums BLOB NOT NULL,
    PRIMARY KEY (segment, layer)) WITHOUT ROWID;
CREATE TABLE blocks (
    hash BLOB NOT NULL, segment TEXT NOT NULL, stop INTEGER NOT NULL, PRIMARY KEY (hash, segment)) WITHOUT ROWID;
CREATE INDEX blocks_of ON blocks (segment);
CREATE TABLE contexts (
    id TEXT PRIMARY KEY, space INTEGER NOT NULL, namespace TEXT NOT NULL, name TEXT, segment TEXT NOT NULL,
    tokens INTEGER NOT NULL, created REAL NOT NULL, used REAL NOT NULL, UNIQUE (namespace, name)) WITHOUT ROWID;
CREATE INDEX contexts_in ON contexts (segment);
"""
# A segment's first block, and whether others branch off within it.
_FIRST = (
    "SELECT s.id, s.start, s.live, s.first, "
    "EXISTS (SELECT 1 FROM segments c WHERE c.parent = s.id AND c.start <= s.start + ?) FROM segments s"
)


@dataclass(frozen=True)
class Link:
    """One segment on the way to a place in the tree.

    Attributes
    ----------
    segment : str
    start : int
        Position in the context of its first token.
    length : int
        Tokens of it that belong to the context.
    """

    segment: str
    start: int
    length: int


@dataclass(frozen=True)
class Chain:
    """The segments that hold a prefix, in order; of the tokens ``0 .. tokens``."""

    links: tuple[Link, ...] = ()

    @property
    def tokens(self) -> int:
        return self.links[-1].start + self.links[-1].length if self.links else 0

    def cut(self, tokens: int) -> Chain:
        """The same for the first ``tokens``."""
        links = [
            Link(link.segment, link.start, min(link.length, tokens - link.start))
            for link in self.links
            if link.start < tokens
        ]
        return Chain(tuple(links))


@dataclass(frozen=True)
class NewSegment:
    """A segment whose files are durable and published, to be committed."""

    id: str
    start: int
    tokens: int
    dtype: str
    files: list[Written]

    @property
    def nbytes(self) -> int:
        return sum(file.nbytes for file in self.files)


@dataclass(frozen=True)
class ContextRow:
    """A stored context, as the catalog has it.

    Attributes
    ----------
    id : str
    name : str or None
        Unique within the namespace.
    namespace : str
    tokens : int
    bytes : int
        Of all its segments on disk, those it shares included.
    own_bytes : int
        Of the segments that would go with it.
    dtype : str
        Of the stored keys and values, of the newest segment.
    layers : int
    created, used : float
        Seconds since 1970.
    model : dict
        The fingerprint's parts.
    """

    id: str
    name: str | None
    namespace: str
    tokens: int
    bytes: int
    own_bytes: int
    dtype: str
    layers: int
    created: float
    used: float
    model: Mapping[str, str]


class Catalog:
    """The catalog of one store.

    Parameters
    ----------
    path : Path
        Of the SQLite file.
    read_only : bool
        Never write, for media that cannot be written to.
    block : int
        Tokens per hashed block, of a new store; an existing one keeps its own.

    Raises
    ------
    StoreError
        For a file of another version, or that is no catalog; and on a read-only medium, if the last writer left a log there,
        without which contexts would be missing.

    Notes
    -----
    Write-ahead logging: readers never wait for a writer. A commit is durable when it returns. Connections belong to a
    process: after a fork the child opens its own.
    """

    def __init__(self, path: Path, *, read_only: bool = False, block: int = 64) -> None:
        self.path, self.read_only, self._block = path, read_only, block
        self._lock = threading.RLock()
        self._db: sqlite3.Connection | None = None
        self._pid = 0
        with self._errors():
            self.block = int(self._connection().execute("SELECT value FROM meta WHERE key = 'block'").fetchone()[0])

    def _connection(self) -> sqlite3.Connection:
        if self._db is None or self._pid != os.getpid():
            # A connection that was carried over a fork is dropped without being closed: closing would drop the parent's locks.
            self._db, self._pid = self._open(), os.getpid()
        return self._db

    def _open(self) -> sqlite3.Connection:
        if not self.read_only:
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            os.close(fd)
        mode = "ro" if self.read_only else "rw"
        db = sqlite3.connect(
            f"{self.path.absolute().as_uri()}?mode={mode}",
            uri=True,
            timeout=60,
            isolation_level=None,
            check_same_thread=False,
        )
        try:
            if not self.read_only:
                db.execute("PRAGMA journal_mode=WAL")
                self._create(db)
            version = db.execute("PRAGMA user_version").fetchone()[0]
        except sqlite3.OperationalError as error:
            if not self.read_only:
                raise
            # A read-only medium has no room for the log's index, and no writer either.
            db.close()
            log = self.path.with_name(f"{self.path.name}-wal")
            if log.exists() and log.stat().st_size:
                raise StoreError(
                    f"{self.path} has commits that are only in its log {log.name}, which cannot be read along "
                    f"with it here ({error}). "
                    "Open the store once where it can be written to, or copy the folder there."
                ) from error
            db = sqlite3.connect(
                f"{self.path.absolute().as_uri()}?mode=ro&immutable=1",
                uri=True,
                isolation_level=None,
                check_same_thread=False,
            )
            version = db.execute("PRAGMA user_version").fetchone()[0]
            warnings.warn(f"{self.path} is opened as unchanging ({error}).", RuntimeWarning, stacklevel=2)
        if version != VERSION:
            db.close()
            raise StoreError(
                f"{self.path} has the format {version}, but this version of alaya_hf reads {VERSION}. Store the contexts again "
                "in a new folder, or use the version that made them."
            )
        db.execute("PRAGMA synchronous=FULL")
        db.execute("PRAGMA trusted_schema=OFF")
        return db

    def _create(self, db: sqlite3.Connection) -> None:
        if db.execute("PRAGMA user_version").fetchone()[0]:
            return
        db.execute("BEGIN IMMEDIATE")
        try:
            if not db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                for statement in _SCHEMA.split(";"):
                    db.execute(statement)
                db.execute("INSERT INTO meta VALUES ('block', ?)", (self._block,))
                db.execute(f"PRAGMA user_version = {VERSION}")
            db.execute("COMMIT")
        except BaseException:
            db.execute("ROLLBACK")
            raise

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            with writing(self.path):
                yield
        except sqlite3.OperationalError as error:
            if "full" in str(error):
                # As the file system says it.
                with writing(self.path):
                    raise OSError(28, "No space left on device") from error
            if "readonly" in str(error):
                raise ReadOnlyStoreError(
                    f"{self.path} cannot be written to ({error}); nothing was stored. Check the owner and the mount of the "
                    "folder, or store elsewhere."
                ) from error
            raise StoreError(f"the catalog {self.path} cannot be used: {error}. Nothing was changed.") from error
        except sqlite3.IntegrityError as error:
            raise StoreError(
                f"what would be stored is in the catalog {self.path} already ({error}), stored by another "
                "process meanwhile. Nothing "
                "was changed; try again."
            ) from error
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:  # names that are no text any more
            raise CorruptStoreError(
                f"the catalog {self.path} is damaged ({error}). Restore it from a copy, or start a new store; the segments "
                "cannot be told apart without it."
            ) from error

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        """One view of the catalog, whatever writers commit meanwhile."""
        with self._lock, self._errors():
            db = self._connection()
            if db.in_transaction:
                yield db
                return
            db.execute("BEGIN")
            try:
                yield db
            finally:
                db.execute("ROLLBACK")

    @contextmanager
    def _changing(self) -> Iterator[sqlite3.Connection]:
        """All of a change or nothing of it."""
        if self.read_only:
            raise ReadOnlyStoreError(
                f"{self.path} was opened read_only; nothing was changed. Open it without read_only."
            )
        with self._lock, self._errors():
            db = self._connection()
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
                db.execute("COMMIT")
            except BaseException:
                if db.in_transaction:
                    db.execute("ROLLBACK")
                raise

    def close(self) -> None:
        """Close the connection; the next call opens it again."""
        with self._lock:
            if self._db is not None and self._pid == os.getpid():
                self._db.close()
            self._db = None

    # Prefixes ---------------------------------------------------------------------------------------------------------

    def longest(self, namespace: str, fields: Mapping[str, str], ids: np.ndarray) -> Chain:
        """The longest stored prefix of a prompt.

        Parameters
        ----------
        namespace : str
        fields : mapping
            The model's fingerprint.
        ids : ndarray
            ``[n]`` int32.

        Returns
        -------
        Chain
            Empty if there is none. Token ids of all of it were compared.

        Raises
        ------
        CorruptStoreError
            If stored token ids do not match their digest.

        Notes
        -----
        One hash per block and a binary search over them: a prefix of a stored prefix is stored.
        """
        hashes = hashing.chain(ids, self.block, namespace)
        with self._reading() as db:
            space = self._space(db, namespace, fields)
            if space is None:
                return Chain()
            low, high = 0, len(hashes)
            while low < high:
                middle = (low + high + 1) // 2
                if self._candidates(db, space, hashes[middle - 1]):
                    low = middle
                else:
                    high = middle - 1
            # Hashes nominate, token ids decide; a collision sends the search one block back.
            for count in range(low, 0, -1):
                best = Chain()
                for segment, stop in self._candidates(db, space, hashes[count - 1]):
                    chain = self._chain(db, segment, stop)
                    if chain.tokens == count * self.block and self._same(db, chain, ids):
                        best = max(best, self._extended(db, space, chain, ids), key=lambda found: found.tokens)
                if best.links:
                    return best
            return self._extended(db, space, Chain(), ids)

    def _candidates(self, db: sqlite3.Connection, space: int, value: bytes) -> list[tuple[str, int]]:
        return db.execute(
            "SELECT b.segment, b.stop FROM blocks b JOIN segments s ON s.id = b.segment WHERE b.hash = ? AND s.space = ?",
            (value, space),
        ).fetchall()

    def _extended(self, db: sqlite3.Connection, space: int, chain: Chain, ids: np.ndarray) -> Chain:
        """Go on token by token where no whole block matches: within a segment, and into those that branch off.

        The ids of the segments in ``chain`` are verified already. First blocks nominate, so that segments which leave the prompt
        within theirs (all that share a chat template, say) cost no reading; the ids of what is returned are verified.
        """
        best = chain
        if chain.links:
            last = chain.links[-1]
            live, own = db.execute(
                "SELECT s.live, t.ids FROM segments s JOIN tokens t ON t.segment = s.id WHERE s.id = ?", (last.segment,)
            ).fetchone()
            known = np.frombuffer(own, np.int32)[last.length : live]
            given = ids[chain.tokens : chain.tokens + known.size]
            equal = _equal(known, given)
            if equal:
                best = Chain((*chain.links[:-1], Link(last.segment, last.start, last.length + equal)))
            children = db.execute(
                f"{_FIRST} WHERE s.space = ? AND s.parent = ? AND s.start BETWEEN ? AND ?",
                (self.block, space, last.segment, chain.tokens, best.tokens),
            )
        else:
            children = db.execute(f"{_FIRST} WHERE s.space = ? AND s.parent IS NULL", (self.block, space))
        trunk = best
        within: tuple[int, str, int, int] | None = None
        further: list[tuple[str, int, int]] = []
        rows = children.fetchall()
        equals = _leading(
            [first[: 4 * live] for _, _, live, first, _ in rows], [row[1] for row in rows], ids, self.block
        )
        for (segment, start, live, _, branches), equal in zip(rows, equals, strict=True):
            if equal and (equal == min(live, self.block) or branches):
                further.append((segment, start, equal))
            elif equal and (within is None or start + equal > within[0]):
                within = (start + equal, segment, start, equal)
        for segment, start, equal in further:
            longer = self._extended(db, space, self._branch(db, trunk, segment, start, equal, ids), ids)
            if longer.tokens > best.tokens:
                best = longer
        if within is not None and within[0] > best.tokens:
            best = self._branch(db, trunk, *within[1:], ids)
        return best

    def _branch(
        self, db: sqlite3.Connection, before: Chain, segment: str, start: int, equal: int, ids: np.ndarray
    ) -> Chain:
        """A chain that leaves another at ``start``, for ``equal`` verified tokens of a segment."""
        links = before.cut(start).links
        if Chain(links).tokens != start or not np.array_equal(
            self._check_ids(db, segment)[:equal], ids[start : start + equal]
        ):
            raise self._damaged(segment)
        return Chain((*links, Link(segment, start, equal)))

    def _chain(self, db: sqlite3.Connection, segment: str, stop: int) -> Chain:
        """The way from the root to position ``stop`` of a context through ``segment``."""
        links: list[Link] = []
        at: str | None = segment
        while at is not None:
            row = db.execute("SELECT parent, start, tokens FROM segments WHERE id = ?", (at,)).fetchone()
            if row is None or not 0 <= row[1] < stop <= row[1] + row[2]:
                raise self._damaged(at)
            links.insert(0, Link(at, row[1], stop - row[1]))
            at, stop = row[0], row[1]
        if stop != 0:
            raise self._damaged(segment)
        return Chain(tuple(links))

    def _damaged(self, segment: str) -> CorruptStoreError:
        return CorruptStoreError(
            f"the catalog {self.path} contradicts itself about segment {segment}. The rest of the store is usable; delete the "
            "contexts in it (`verify` names them) and store them again."
        )

    def _check_ids(self, db: sqlite3.Connection, segment: str) -> np.ndarray:
        row = db.execute(
            "SELECT t.ids, s.digest, s.tokens FROM segments s JOIN tokens t ON t.segment = s.id WHERE s.id = ?",
            (segment,),
        ).fetchone()
        if row is None or hashing.digest(row[0]) != row[1] or len(row[0]) != 4 * row[2]:
            raise self._damaged(segment)
        ids: bytes = row[0]
        return np.frombuffer(ids, np.int32)

    def ids_of(self, chain: Chain) -> np.ndarray:
        """The token ids of a prefix, ``[n]`` int32, verified."""
        with self._reading() as db:
            parts = [self._check_ids(db, link.segment)[: link.length] for link in chain.links]
        return np.concatenate(parts) if parts else np.empty(0, np.int32)

    def _same(self, db: sqlite3.Connection, chain: Chain, ids: np.ndarray) -> bool:
        for link in chain.links:
            known = self._check_ids(db, link.segment)[: link.length]
            if not np.array_equal(known, ids[link.start : link.start + link.length]):
                return False
        return True

    def _space(self, db: sqlite3.Connection, namespace: str, fields: Mapping[str, str]) -> int | None:
        row = db.execute(
            "SELECT id FROM spaces WHERE namespace = ? AND digest = ?", (namespace, digest_of(fields))
        ).fetchone()
        return None if row is None else int(row[0])

    # Segments ---------------------------------------------------------------------------------------------------------

    def files(self, segment: str) -> list[Written]:
        """What is known of a segment's files, by layer; empty if the segment is gone."""
        with self._reading() as db:
            rows = db.execute(
                "SELECT layer, bytes, header, checksums FROM files WHERE segment = ? ORDER BY layer", (segment,)
            ).fetchall()
        return [Written(*row) for row in rows]

    def readers(self, segment: str, most: int = 3) -> list[str]:
        """Names or ids of some contexts that read a segment."""
        with self._reading() as db:
            rows = db.execute(
                "WITH RECURSIVE below(id) AS (VALUES (?) UNION SELECT s.id FROM segments s JOIN below b ON s.parent = b.id) "
                "SELECT coalesce(c.name, substr(c.id, 1, 8)) FROM below b JOIN contexts c ON c.segment = b.id LIMIT ?",
                (segment, most),
            ).fetchall()
        return [row[0] for row in rows]

    def parts_of(self, segment: str) -> dict[str, object] | None:
        """A segment's row as plain values, for a remote store; None if it is gone."""
        with self._reading() as db:
            row = db.execute("SELECT parent, start, tokens, dtype FROM segments WHERE id = ?", (segment,)).fetchone()
            if row is None:
                return None
            ids = self._check_ids(db, segment).tobytes()
        return {**dict(zip(("parent", "start", "tokens", "dtype"), row, strict=True)), "ids": ids}

    def known(self) -> set[str]:
        """Ids of all segments."""
        with self._reading() as db:
            return {row[0] for row in db.execute("SELECT id FROM segments")}

    def knows(self, segment: str) -> bool:
        """Whether a segment is committed."""
        with self._reading() as db:
            return db.execute("SELECT 1 FROM segments WHERE id = ?", (segment,)).fetchone() is not None

    def total_bytes(self, namespace: str) -> int:
        """Bytes of a namespace's segments."""
        with self._reading() as db:
            row = db.execute(
                "SELECT coalesce(sum(s.bytes), 0) FROM segments s JOIN spaces p ON p.id = s.space WHERE p.namespace = ?",
                (namespace,),
            ).fetchone()
        return int(row[0])

    # Contexts ---------------------------------------------------------------------------------------------------------

    def commit(
        self,
        namespace: str,
        fields: Mapping[str, str],
        ids: np.ndarray,
        base: Chain,
        new: Sequence[NewSegment],
        name: str | None,
    ) -> tuple[str, list[str]]:
        """Make a context visible.

        Parameters
        ----------
        namespace : str
        fields : mapping
            The model's fingerprint.
        ids : ndarray
            ``[n]`` int32, of the whole context.
        base : Chain
            What is stored of it already.
        new : sequence of NewSegment
            The rest, in order.
        name : str, optional

        Returns
        -------
        context : str
        removed : list of str
            Segments that a context of the same name gave up.

        Raises
        ------
        LookupError
            If the base was deleted meanwhile, or belongs to another namespace or model: write all of it.
        ContextExistsError
            If the name belongs to a context that this one does not continue, or to another model's.
        """
        now = time.time()
        hashes = hashing.chain(ids, self.block, namespace)
        with self._changing() as db:
            db.execute(
                "INSERT OR IGNORE INTO spaces (namespace, digest, fields) VALUES (?, ?, ?)",
                (namespace, digest_of(fields), json.dumps(dict(fields), sort_keys=True)),
            )
            space = self._space(db, namespace, fields)
            for link in base.links:
                # A session may have begun in another namespace, or under another model: nothing is shared across them.
                row = db.execute("SELECT live, space FROM segments WHERE id = ?", (link.segment,)).fetchone()
                if row is None or row[0] < link.length or row[1] != space:
                    raise LookupError(link.segment)
            last = base.links[-1].segment if base.links else None
            for segment in new:
                stop = segment.start + segment.tokens
                own = np.ascontiguousarray(ids[segment.start : stop], np.int32).tobytes()
                db.execute(
                    "INSERT INTO segments VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    (
                        segment.id,
                        space,
                        last,
                        segment.start,
                        segment.tokens,
                        segment.tokens,
                        own[: 4 * self.block],
                        hashing.digest(own),
                        segment.nbytes,
                        segment.dtype,
                        now,
                    ),
                )
                db.execute("INSERT INTO tokens VALUES (?, ?)", (segment.id, own))
                db.executemany(
                    "INSERT INTO files VALUES (?, ?, ?, ?, ?)",
                    [(segment.id, file.layer, file.nbytes, file.header, file.checksums) for file in segment.files],
                )
                ends = range(segment.start // self.block + 1, stop // self.block + 1)
                db.executemany(
                    "INSERT INTO blocks VALUES (?, ?, ?)",
                    [(hashes[number - 1], segment.id, number * self.block) for number in ends],
                )
                last = segment.id
            given_up = None if name is None else self._take_name(db, space, namespace, name, ids, last)
            same = db.execute(
                "SELECT id FROM contexts WHERE segment = ? AND tokens = ? AND name IS ?", (last, len(ids), name)
            ).fetchone()
            if same is not None:
                context_id = str(same[0])
                db.execute("UPDATE contexts SET used = ? WHERE id = ?", (now, context_id))
            else:
                context_id = secrets.token_hex(16)
                db.execute(
                    "INSERT INTO contexts VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                    (context_id, space, namespace, name, last, len(ids), now, now),
                )
            return context_id, self._release(db, given_up)

    def _take_name(
        self, db: sqlite3.Connection, space: int | None, namespace: str, name: str, ids: np.ndarray, last: str | None
    ) -> str | None:
        """Make a name free for a context that ends in segment ``last``; the segment that its owner refers to no longer."""
        row = db.execute(
            "SELECT c.id, c.segment, c.tokens, c.space, s.fields FROM contexts c JOIN spaces s ON s.id = c.space "
            "WHERE c.namespace = ? AND c.name = ?",
            (namespace, name),
        ).fetchone()
        if row is None:
            return None
        context, segment, tokens, theirs, fields = row
        if theirs != space:
            ours = db.execute("SELECT fields FROM spaces WHERE id = ?", (space,)).fetchone()[0]
            raise ContextExistsError(
                f"the namespace {namespace!r} has a context named {name!r} already, made by another model; what differs: "
                f"{differences(json.loads(ours), json.loads(fields))}. Nothing was stored: choose another name or namespace, or "
                "delete that context first."
            )
        chain = self._chain(db, segment, tokens)
        if chain.tokens > len(ids) or not self._same(db, chain, ids):
            raise ContextExistsError(
                f"the namespace {namespace!r} has another context named {name!r}, of {chain.tokens} tokens that these do not "
                "continue. Nothing was stored: choose another name, or delete that context first."
            )
        if chain.tokens == len(ids):
            # The same context, perhaps stored meanwhile by another process: it stays, where it lies now.
            db.execute("UPDATE contexts SET segment = ? WHERE id = ?", (last, context))
            return None if segment == last else str(segment)
        db.execute("DELETE FROM contexts WHERE id = ?", (context,))
        return str(segment)

    def _release(self, db: sqlite3.Connection, segment: str | None) -> list[str]:
        """Recount what refers to a segment; remove what nothing refers to, up the tree."""
        removed: list[str] = []
        while segment is not None:
            row = db.execute("SELECT parent, start, live FROM segments WHERE id = ?", (segment,)).fetchone()
            if row is None:
                raise self._damaged(segment)
            parent, start, live = row
            ends = db.execute("SELECT max(tokens) FROM contexts WHERE segment = ?", (segment,)).fetchone()[0]
            branches = db.execute("SELECT max(start) FROM segments WHERE parent = ?", (segment,)).fetchone()[0]
            end = max(ends or 0, branches or 0)
            if end:
                if end - start < live:
                    # Nothing refers to its last tokens any more: they must not be found.
                    db.execute("UPDATE segments SET live = ? WHERE id = ?", (end - start, segment))
                    db.execute("DELETE FROM blocks WHERE segment = ? AND stop > ?", (segment, end))
                break
            for table, column in (
                ("segments", "id"),
                ("tokens", "segment"),
                ("files", "segment"),
                ("blocks", "segment"),
            ):
                db.execute(f"DELETE FROM {table} WHERE {column} = ?", (segment,))
            removed.append(segment)
            segment = parent
        return removed

    def delete(self, context: str) -> list[str]:
        """Remove a context by id; the segments that went with it."""
        with self._changing() as db:
            row = db.execute("SELECT segment FROM contexts WHERE id = ?", (context,)).fetchone()
            if row is None:
                raise UnknownContextError(f"there is no context {context!r} any more; nothing was deleted.")
            db.execute("DELETE FROM contexts WHERE id = ?", (context,))
            return self._release(db, row[0])

    def touch(self, chain: Chain) -> None:
        """Note that the contexts of a prefix were used; does nothing on a store that cannot be written to."""
        if self.read_only or not chain.links:
            return
        marks = ",".join("?" * len(chain.links))
        try:
            with self._lock:
                db = self._connection()
                # Not worth waiting for the disk.
                db.execute("PRAGMA synchronous=NORMAL")
                try:
                    db.execute(
                        f"UPDATE contexts SET used = ? WHERE segment IN ({marks})",
                        (time.time(), *(link.segment for link in chain.links)),
                    )
                finally:
                    db.execute("PRAGMA synchronous=FULL")
        except sqlite3.Error:
            pass

    def find(self, namespace: str, context: str) -> tuple[str, Chain, dict[str, str]]:
        """A context by id, by the first eight or more characters of it, or by name.

        Returns
        -------
        id : str
        chain : Chain
        fields : dict
            The fingerprint of its model.

        Raises
        ------
        UnknownContextError
        """
        with self._reading() as db:
            rows = db.execute(
                "SELECT c.id, c.segment, c.tokens, s.fields FROM contexts c JOIN spaces s ON s.id = c.space "
                "WHERE c.namespace = ? AND (c.name = ? OR c.id = ? OR (length(?) >= 8 AND substr(c.id, 1, length(?)) = ?))",
                (namespace, *[context] * 5),
            ).fetchall()
            if len(rows) != 1:
                raise UnknownContextError(
                    f"the namespace {namespace!r} of {self.path.parent} has {len(rows)} contexts {context!r}. Expected a name or "
                    "the beginning of an id, as `list` gives them."
                )
            return rows[0][0], self._chain(db, rows[0][1], rows[0][2]), json.loads(rows[0][3])

    def open(self, namespace: str, context: str) -> tuple[Chain, dict[str, str], np.ndarray]:
        """What :meth:`find` finds and its token ids, as of one moment.

        Returns
        -------
        chain : Chain
        fields : dict
            The fingerprint of its model.
        ids : ndarray
            ``[n]`` int32, verified.

        Raises
        ------
        UnknownContextError
        CorruptStoreError
        """
        with self._reading():
            _, chain, fields = self.find(namespace, context)
            return chain, fields, self.ids_of(chain)

    def contexts(self, namespace: str | None, only: str | None = None) -> list[ContextRow]:
        """All contexts of a namespace (None: of all), most recently used first."""
        with self._reading() as db:
            rows = db.execute(
                "SELECT c.id, c.name, c.namespace, c.tokens, c.segment, c.created, c.used, s.fields FROM contexts c "
                "JOIN spaces s ON s.id = c.space WHERE (:space IS NULL OR c.namespace = :space) "
                "AND (:only IS NULL OR c.id = :only) ORDER BY c.used DESC, c.id",
                {"space": namespace, "only": only},
            ).fetchall()
            return [self._row(db, *row) for row in rows]

    def _row(
        self,
        db: sqlite3.Connection,
        context: str,
        name: str | None,
        namespace: str,
        tokens: int,
        segment: str,
        created: float,
        used: float,
        fields: str,
    ) -> ContextRow:
        total, own, alone, dtype = 0, 0, True, ""
        for link in reversed(self._chain(db, segment, tokens).links):
            size, kind = db.execute("SELECT bytes, dtype FROM segments WHERE id = ?", (link.segment,)).fetchone()
            readers = db.execute("SELECT count(*) FROM contexts WHERE segment = ?", (link.segment,)).fetchone()[0]
            readers += db.execute("SELECT count(*) FROM segments WHERE parent = ?", (link.segment,)).fetchone()[0]
            alone = alone and readers == 1
            total += size
            own += size if alone else 0
            dtype = dtype or kind
        layers = db.execute("SELECT count(*) FROM files WHERE segment = ?", (segment,)).fetchone()[0]
        return ContextRow(
            context, name, namespace, tokens, total, own, dtype, layers, created, used, json.loads(fields)
        )

    def segments_of(self, namespace: str | None) -> Iterable[tuple[str, list[str]]]:
        """Every segment with the contexts that read it, by name or id."""
        with self._reading() as db:
            readers: dict[str, list[str]] = {}
            rows = db.execute(
                "SELECT id, name, segment, tokens FROM contexts WHERE :space IS NULL OR namespace = :space",
                {"space": namespace},
            ).fetchall()
            for context, name, segment, tokens in rows:
                for link in self._chain(db, segment, tokens).links:
                    readers.setdefault(link.segment, []).append(name or context[:8])
        return sorted(readers.items())

    def others(self, namespace: str, fields: Mapping[str, str], ids: np.ndarray) -> tuple[int, dict[str, str]] | None:
        """Whether another model's context of this namespace begins like a prompt: blocks that match, its fingerprint."""
        hashes = hashing.chain(ids, self.block, namespace)
        with self._reading() as db:
            rows = db.execute(
                "SELECT id, fields FROM spaces WHERE namespace = ? AND digest != ?", (namespace, digest_of(fields))
            ).fetchall()
            if hashes:
                for space, theirs in rows:
                    if self._candidates(db, space, hashes[0]):
                        return self.block, json.loads(theirs)
        return None


def _equal(a: np.ndarray, b: np.ndarray) -> int:
    """How many leading elements agree."""
    count = min(a.size, b.size)
    different = np.flatnonzero(a[:count] != b[:count])
    return int(different[0]) if different.size else count


def _leading(firsts: list[bytes], starts: list[int], ids: np.ndarray, block: int) -> list[int]:
    """How many leading tokens of each first block agree with a prompt from a position of its own on."""
    known = np.frombuffer(b"".join(first.ljust(4 * block, b"\xff") for first in firsts), np.int32).reshape(-1, block)
    padded = np.concatenate([ids, np.full(block, -2, np.int32)])
    different = known != padded[np.asarray(starts, np.int64)[:, None] + np.arange(block)]
    equals: list[int] = np.where(different.any(axis=1), different.argmax(axis=1), block).tolist()
    return equals
