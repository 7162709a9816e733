"""Mooncake Store: a distributed pool of memory (arXiv 2407.00079)."""

from __future__ import annotations

from typing import Any

from alaya_hf.errors import RemoteError


class MooncakeStore:
    """A client of a Mooncake cluster that lends it memory of its own.

    Parameters
    ----------
    master : str
        Address of ``mooncake_master``, ``"host:port"``.
    metadata : str
        Of the transfer engine, ``"http://host:port/metadata"`` or ``"P2PHANDSHAKE"``.
    host : str
        This machine's address, as the others reach it.
    segment_bytes : int
        Memory that this client lends to the pool, 0 for none.
    buffer_bytes : int
        For transfers.
    protocol : {"tcp", "rdma"}
    device : str
        Of RDMA.

    Raises
    ------
    RemoteError
        If the package is not installed or the cluster cannot be reached.

    Notes
    -----
    Contexts live in the pool as long as its memory lasts: Mooncake evicts what has not been used. A context that is gone is read
    from local disk, or recomputed.
    """

    def __init__(
        self,
        master: str,
        metadata: str = "P2PHANDSHAKE",
        host: str = "127.0.0.1",
        *,
        segment_bytes: int = 1 << 30,
        buffer_bytes: int = 1 << 27,
        protocol: str = "tcp",
        device: str = "",
    ) -> None:
        try:
            from mooncake.store import MooncakeDistributedStore
        except ImportError as error:
            raise RemoteError(
                f"Mooncake Store cannot be loaded ({error}). Run: pip install 'alaya_hf[mooncake]'; it needs the system "
                "libraries libibverbs1, librdmacm1 and libnuma1."
            ) from error
        self._store: Any = MooncakeDistributedStore()
        code = self._store.setup(host, metadata, segment_bytes, buffer_bytes, protocol, device, master)
        if code:
            raise RemoteError(
                f"the Mooncake master at {master} cannot be reached (code {code}). Is mooncake_master running?"
            )

    def put(self, key: str, value: bytes) -> None:
        """See :meth:`RemoteStore.put`."""
        code = self._store.put(key, value)
        if code and not self.exists(key):
            raise RemoteError(
                f"Mooncake refused {len(value):,} bytes under {key!r} (code {code}); its memory may be full."
            )

    def get(self, key: str) -> bytes | None:
        """See :meth:`RemoteStore.get`."""
        value = self._store.get(key)
        # Mooncake gives empty bytes for a missing name; this package stores none.
        return bytes(value) if value else None

    def exists(self, key: str) -> bool:
        """See :meth:`RemoteStore.exists`."""
        found = self._store.is_exist(key)
        if found < 0:
            raise RemoteError(f"Mooncake does not answer (code {found}).")
        return bool(found)

    def close(self) -> None:
        """Leave the cluster; memory that was lent goes back."""
        self._store.close()
