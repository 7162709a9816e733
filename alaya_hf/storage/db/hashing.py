"""Chained hashes of blocks of token ids: one hash stands for everything up to the end of its block."""

from __future__ import annotations

from hashlib import blake2b

import numpy as np

SIZE = 16  # bytes of a hash


def digest(data: bytes | memoryview) -> bytes:
    """BLAKE2b of 16 bytes."""
    return blake2b(data, digest_size=SIZE).digest()


def chain(ids: np.ndarray, block: int, namespace: str) -> list[bytes]:
    """Hashes of the prefixes that end at whole blocks.

    Parameters
    ----------
    ids : ndarray
        ``[n]`` int32 token ids.
    block : int
        Tokens per block.
    namespace : str
        Part of every hash, so that equal text of two tenants has nothing in common.

    Returns
    -------
    list of bytes
        ``n // block`` hashes; the ``i``-th covers tokens ``0 .. (i + 1) * block``.

    Notes
    -----
    Hashes only nominate: what is attached is decided by comparing token ids. The scheme is that of vLLM's automatic prefix
    caching. About 1 microsecond per block.
    """
    hashes = []
    before = blake2b(namespace.encode(), digest_size=SIZE).digest()
    data = np.ascontiguousarray(ids, np.int32).data.cast("B")
    step = 4 * block
    for start in range(0, len(data) - step + 1, step):
        before = blake2b(data[start : start + step], digest_size=SIZE, key=before).digest()
        hashes.append(before)
    return hashes
