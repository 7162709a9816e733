"""Any object store that fsspec knows: S3, GCS, Azure, HTTP, SFTP, a shared folder."""

from __future__ import annotations

import contextlib
import os
import secrets
from typing import Any

from alaya_hf.errors import RemoteError


class FsspecStore:
    """A remote store under a URL of fsspec.

    Parameters
    ----------
    url : str
        For example ``"s3://bucket/contexts"`` or ``"file:///mnt/share/contexts"``. What is made under a ``file:`` URL is its
        owner's alone, folders 0700 and files 0600, as in a local store.
    **options
        As for ``fsspec.core.url_to_fs``: credentials, endpoints.

    Raises
    ------
    RemoteError
        If fsspec, or what the URL needs, is not installed.
    """

    def __init__(self, url: str, **options: Any) -> None:
        try:
            import fsspec
        except ImportError as error:
            raise RemoteError("a store under a URL needs fsspec. Run: pip install 'alaya_hf[remote]'") from error
        try:
            self._fs, self._root = fsspec.core.url_to_fs(url, **options)
        except (ImportError, ValueError) as error:
            raise RemoteError(f"fsspec cannot open {url!r}: {error}") from error

    def _path(self, key: str) -> str:
        return f"{self._root.rstrip('/')}/{key}"

    def put(self, key: str, value: bytes) -> None:
        """See :meth:`RemoteStore.put`. Written aside and moved where the store has names that appear before they are whole."""
        path = self._path(key)
        if "file" in self._fs.protocol or "local" in self._fs.protocol:
            _make_folders(os.path.dirname(path))
            aside = f"{path}.{secrets.token_hex(8)}"
            fd = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            with open(fd, "wb") as file:
                file.write(value)
            os.replace(aside, path)
        else:
            self._fs.pipe_file(path, value)

    def get(self, key: str) -> bytes | None:
        """See :meth:`RemoteStore.get`."""
        try:
            return bytes(self._fs.cat_file(self._path(key)))
        except FileNotFoundError:
            return None

    def exists(self, key: str) -> bool:
        """See :meth:`RemoteStore.exists`."""
        return bool(self._fs.exists(self._path(key)))

    def close(self) -> None:
        """Nothing is held."""


def _make_folders(path: str) -> None:
    """A folder and those above it, each for its owner alone: ``os.makedirs`` gives its mode to the last one only."""
    if path and not os.path.isdir(path):
        _make_folders(os.path.dirname(path))
        with contextlib.suppress(FileExistsError):
            os.mkdir(path, 0o700)
