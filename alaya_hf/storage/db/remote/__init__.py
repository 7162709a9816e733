"""Stores that a fleet shares: a small protocol, and its backends."""

from alaya_hf.storage.db.remote.base import RemoteStore

__all__ = ["RemoteStore"]
