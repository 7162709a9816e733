"""The folder of a store: names, permissions, durability, and who may sweep it."""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from alaya_hf.errors import CorruptStoreError, DiskFullError, ReadOnlyStoreError, StoreError

_ID = re.compile(r"[0-9a-f]{32}")
_STAGED = re.compile(r"[0-9a-f]{32}\.[0-9a-f]{16}")
_NO_ROOM = {"ENOSPC", "EDQUOT", "EFBIG"}


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the system says about a full or read-only disk into errors that say what to do.

    Raises
    ------
    DiskFullError, ReadOnlyStoreError
    """
    try:
        yield
    except OSError as error:
        if isinstance(error, StoreError):
            raise
        code = errno_name(error)
        if code in _NO_ROOM:
            raise DiskFullError(
                f"the disk of {path} is full ({error.strerror}); nothing was stored, and every earlier context is as it was. "
                "Make room, for example with gc(max_bytes), and store again."
            ) from error
        if code in ("EROFS", "EACCES", "EPERM"):
            raise ReadOnlyStoreError(
                f"{path} cannot be written to ({error.strerror}); nothing was stored. Expected a folder this user may write "
                "to: check its owner and mount, or store elsewhere."
            ) from error
        raise


def errno_name(error: OSError) -> str:
    """``"ENOSPC"`` and the like."""
    import errno

    return errno.errorcode.get(error.errno or 0, "")


class Folder:
    """Where a store lives.

    Parameters
    ----------
    path : Path
    create : bool
        Make the folder, for its owner alone (0700), if there is none.

    Raises
    ------
    StoreError
        If it is no store, or ``segments`` or ``staging`` is a link: sweeping would remove what lies behind it.

    Notes
    -----
    ``catalog.sqlite`` says what exists. ``segments/<id>/`` holds the files of a segment, one per layer; ``staging/`` what
    is being written; ``lock`` is held shared by writers and exclusively by whoever sweeps.
    """

    def __init__(self, path: Path, create: bool) -> None:
        self.path = path
        self.catalog = path / "catalog.sqlite"
        self.segments = path / "segments"
        self.staging = path / "staging"
        if create:
            with writing(path):
                for folder in (path, self.segments, self.staging):
                    folder.mkdir(mode=0o700, parents=folder is path, exist_ok=True)
        for folder in (self.segments, self.staging):
            if folder.is_symlink():
                raise StoreError(
                    f"{folder} is a link to {os.readlink(folder)}. Expected a folder of this store's own: what "
                    "is in it is swept. "
                    "Make the whole store a link instead, or store elsewhere."
                )
        if not self.segments.is_dir():
            raise StoreError(
                f"{path} is no store of contexts: it has no folder 'segments'. Expected one made by AlayaDB."
            )

    def segment(self, segment: str) -> Path:
        """The folder of a segment.

        Raises
        ------
        CorruptStoreError
            If the id, which comes from the catalog, is not one of ours: it must not become another path.
        """
        if not _ID.fullmatch(segment):
            raise CorruptStoreError(
                f"the catalog of {self.path} names a segment {segment!r}, which is no id of a segment."
            )
        return self.segments / segment

    def open_segment(self, segment: str) -> int:
        """A descriptor of a segment's folder, which may not be a link."""
        return os.open(self.segment(segment), os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)

    def new_staging(self, segment: str) -> Path:
        """An empty folder to write a segment's files to."""
        # A name of its own: what an interrupted write of the same segment left must not be in the way.
        path = self.staging / f"{segment}.{secrets.token_hex(8)}"
        path.mkdir(mode=0o700)
        return path

    def publish(self, staged: Path, segment: str) -> None:
        """Give durable files their name; they become visible when the catalog says so."""
        sync_folder(staged)
        os.rename(staged, self.segment(segment))
        sync_folder(self.segments)
        sync_folder(self.staging)

    def check_room(self, needed: int) -> None:
        """Refuse to start what cannot fit.

        Raises
        ------
        DiskFullError
        """
        free = shutil.disk_usage(self.path).free
        if needed > free:
            raise DiskFullError(
                f"storing this context needs {needed:,} bytes, but the disk of {self.path} has {free:,} left; nothing was "
                "stored. Make room, for example with gc(max_bytes)."
            )

    def remove_segment(self, segment: str) -> None:
        """Remove a segment's files; a reader that has them mapped keeps them."""
        shutil.rmtree(self.segment(segment), ignore_errors=True)

    @contextmanager
    def writer(self) -> Iterator[None]:
        """Held while files exist that the catalog does not name yet."""
        with self._locked(fcntl.LOCK_SH):
            yield

    @contextmanager
    def sweeper(self) -> Iterator[bool]:
        """Whether nobody is writing, so that files without a row are left over from a crash."""
        try:
            with self._locked(fcntl.LOCK_EX | fcntl.LOCK_NB):
                yield True
        except BlockingIOError:
            yield False

    @contextmanager
    def _locked(self, how: int) -> Iterator[None]:
        fd = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, how)
            yield
        finally:
            os.close(fd)

    def leftovers(self, known: set[str]) -> list[Path]:
        """Folders that no row of the catalog names; meaningful while :meth:`sweeper` is held. Of names that a "
        "store gives only."""
        left = [path for path in _folders(self.segments, _ID) if path.name not in known]
        return left + _folders(self.staging, _STAGED)


def _folders(where: Path, name: re.Pattern[str]) -> list[Path]:
    """Folders, not links to some, whose name is one of ours; none if somebody made ``where`` a link meanwhile."""
    if not stat.S_ISDIR(os.lstat(where).st_mode):
        return []
    return [
        Path(entry) for entry in os.scandir(where) if name.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False)
    ]
