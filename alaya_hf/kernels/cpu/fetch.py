"""Rows of a mapped file copied to a buffer, their blocks verified on the way."""

from __future__ import annotations

import numpy as np
from numba import njit

from alaya_hf.kernels.cpu.checksum import BLOCK, _xxh64

__all__ = ["fetch_rows", "fetch_rows_reference"]

_WORDS = BLOCK // 8


@njit(cache=True, nogil=True, error_model="numpy")
def fetch_rows(words, sums, verified, ids, counts, firsts, lasts, origin, heads, tokens, row, out, begin, end):
    """Copy the listed tokens of some lists; returns the number of the first damaged block, or -1.

    Runs in the calling thread without the interpreter's lock: threads share the lists among them.

    Parameters
    ----------
    words : ndarray ``[blocks * 512]`` uint64
        The mapped bytes; they begin with ``[heads, tokens, row]`` words.
    sums : ndarray ``[blocks]`` uint64
    verified : ndarray ``[blocks]`` bool
        What was verified before is not verified again; what is now, is noted.
    ids : ndarray ``[lists, cap]`` int32
        Places; the lists of a batch row and head are side by side.
    counts : ndarray ``[lists]`` int32
    firsts, lasts : ndarray ``[batch]`` int64
        Places outside of ``firsts[b] <= place < lasts[b]`` are left out: they lie elsewhere.
    origin : int
        Place ``p`` is token ``p + origin``.
    heads, tokens, row : int
    out : ndarray ``[lists, cap, row]`` uint64
    begin, end : int
        The lists to do.
    """
    per_batch = ids.shape[0] // lasts.shape[0]
    per_head = per_batch // heads
    for index in range(begin, end):
        b = index // per_batch
        head = index % per_batch // per_head
        for x in range(counts[index]):
            place = np.int64(ids[index, x])
            if place < firsts[b] or place >= lasts[b]:
                continue
            at = (head * tokens + place + origin) * row
            for block in range(at // _WORDS, (at + row - 1) // _WORDS + 1):
                if not verified[block]:
                    if _xxh64(words, block * _WORDS, np.uint64(block)) != sums[block]:
                        return block
                    verified[block] = True
            for i in range(row):
                out[index, x, i] = words[at + i]
    return -1


def fetch_rows_reference(
    words, sums, verified, ids, counts, firsts, lasts, origin, heads, tokens, row, out, begin, end
):
    """:func:`fetch_rows` in numpy, without checksums."""
    rows = words[: heads * tokens * row].reshape(heads, tokens, row)
    lists = ids.reshape(lasts.shape[0], heads, -1, ids.shape[1])
    numbers = counts.reshape(lists.shape[:3])
    flat = out.reshape(*lists.shape, row)
    for b, head, number in np.ndindex(*lists.shape[:3]):
        for x in range(numbers[b, head, number]):
            place = int(lists[b, head, number, x])
            if firsts[b] <= place < lasts[b]:
                flat[b, head, number, x] = rows[head, place + origin]
    return -1
