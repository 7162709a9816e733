"""What a remote store has to do."""

from __future__ import annotations

from typing import Protocol, runtime_checkable


@runtime_checkable
class RemoteStore(Protocol):
    """Bytes under names. Values never change: a name that exists may be left as it is.

    Names are of lower-case letters, digits, ``-`` and ``/``; values have up to 16 MiB. Any exception, and any call that takes too
    long, is taken for an absent store.
    """

    def put(self, key: str, value: bytes) -> None:
        """Keep a value."""

    def get(self, key: str) -> bytes | None:
        """A value, or None if there is none."""

    def exists(self, key: str) -> bool:
        """Whether there is a value."""

    def close(self) -> None:
        """Let go of connections."""
