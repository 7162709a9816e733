"""Any object store that fsspec knows: S3, GCS, Azure, HTTP, SFTP, a shared folder."""

from __future__ import annotations

from typing import Any

from alaya_hf.errors import RemoteError


class FsspecStore:
    """A remote store under a URL of fsspec.

    Parameters
    ----------
    url : str
        For example ``"s3://bucket/contexts"`` or ``"file:///mnt/share/contexts"``.
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
            import secrets

            self._fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
            aside = f"{path}.{secrets.token_hex(8)}"
            self._fs.pipe_file(aside, value)
            self._fs.mv(aside, path)
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
