"""Checksums of a file's blocks: XXH64 of every 4,096 bytes, seeded with the block's number."""

from __future__ import annotations

import threading

import numpy as np
from numba import njit, prange

__all__ = ["BLOCK", "block_checksums", "block_checksums_reference", "first_damaged", "verify_range"]

BLOCK = 4096  # bytes, a page: what is checked is what a fault brings in
_STRIPES = BLOCK // 32
_FEW = 1024  # blocks, 0.4 ms of one core

_P1 = 0x9E3779B185EBCA87
_P2 = 0xC2B2AE3D27D4EB4F
_P3 = 0x165667B19E3779F9
_P4 = 0x85EBCA77C2B2AE63
_MASK = (1 << 64) - 1
_U1, _U2, _U3, _U4 = np.uint64(_P1), np.uint64(_P2), np.uint64(_P3), np.uint64(_P4)
_SIZE = np.uint64(BLOCK)


@njit(cache=True, nogil=True, error_model="numpy")
def _rotate(x, count):
    return (x << np.uint64(count)) | (x >> np.uint64(64 - count))


@njit(cache=True, nogil=True, error_model="numpy")
def _round(acc, word):
    return _rotate(acc + word * _U2, 31) * _U1


@njit(cache=True, nogil=True, error_model="numpy")
def _xxh64(words, at, seed):
    a = seed + _U1 + _U2
    b = seed + _U2
    c = seed
    d = seed - _U1
    for i in range(_STRIPES):
        a = _round(a, words[at + 4 * i])
        b = _round(b, words[at + 4 * i + 1])
        c = _round(c, words[at + 4 * i + 2])
        d = _round(d, words[at + 4 * i + 3])
    h = _rotate(a, 1) + _rotate(b, 7) + _rotate(c, 12) + _rotate(d, 18)
    zero = np.uint64(0)
    h = (h ^ _round(zero, a)) * _U1 + _U4
    h = (h ^ _round(zero, b)) * _U1 + _U4
    h = (h ^ _round(zero, c)) * _U1 + _U4
    h = (h ^ _round(zero, d)) * _U1 + _U4
    h += _SIZE
    h = (h ^ (h >> np.uint64(33))) * _U2
    h = (h ^ (h >> np.uint64(29))) * _U3
    return h ^ (h >> np.uint64(32))


@njit(parallel=True, cache=True, nogil=True, error_model="numpy")
def _all_blocks(words, first, out):
    for i in prange(out.size):
        out[i] = _xxh64(words, i * (BLOCK // 8), np.uint64(first + i))


@njit(parallel=True, cache=True, nogil=True, error_model="numpy")
def _compare(words, blocks, sums, same):
    for i in prange(blocks.size):
        block = blocks[i]
        same[i] = _xxh64(words, block * (BLOCK // 8), np.uint64(block)) == sums[block]


@njit(cache=True, nogil=True, error_model="numpy")
def _compare_alone(words, blocks, sums, same):
    for i in range(blocks.size):
        block = blocks[i]
        same[i] = _xxh64(words, block * (BLOCK // 8), np.uint64(block)) == sums[block]


@njit(cache=True, nogil=True, error_model="numpy")
def verify_range(words, sums, verified, start, stop):
    """Number of the first of blocks ``start`` to ``stop - 1`` that does not have its checksum, or -1; the others are noted.

    Runs in the calling thread without the interpreter's lock, and does all there is to do without it.
    """
    for block in range(start, stop):
        if not verified[block]:
            if _xxh64(words, block * (BLOCK // 8), np.uint64(block)) != sums[block]:
                return block
            verified[block] = True
    return -1


def _words(data: np.ndarray) -> np.ndarray:
    if data.dtype != np.uint8 or data.ndim != 1 or data.size % BLOCK:
        raise ValueError(f"expected a flat uint8 array of whole {BLOCK}-byte blocks, got {data.dtype} {data.shape}")
    words = data.view(np.uint64)
    # One compiled kernel serves mapped files, which are read-only, and buffers, which are not.
    words.flags.writeable = False
    return words


@njit(cache=True, nogil=True, error_model="numpy")
def _all_blocks_alone(words, first, out):
    for i in range(out.size):
        out[i] = _xxh64(words, i * (BLOCK // 8), np.uint64(first + i))


def block_checksums(data: np.ndarray, first: int = 0, alone: bool = False) -> np.ndarray:
    """Checksums of consecutive blocks.

    Parameters
    ----------
    data : ndarray
        ``[blocks * 4096]`` uint8, contiguous.
    first : int
        Number of the first block in its file; it seeds the sum, so that blocks that change places are noticed.
    alone : bool
        The calling thread does it all: threads of one's own may not start numba's, not every layer of which bears two at a
        time.

    Returns
    -------
    ndarray
        ``[blocks]`` uint64.

    Raises
    ------
    ValueError
        For another dtype or a size that is not a multiple of a block.

    Notes
    -----
    XXH64 (Yann Collet, xxHash specification), 3 to 10 GB/s per core.
    """
    words = _words(data)
    out = np.empty(data.size // BLOCK, np.uint64)
    (_all_blocks_alone if alone else _all_blocks)(words, first, out)
    return out


def first_damaged(data: np.ndarray, blocks: np.ndarray, sums: np.ndarray) -> int:
    """Number of the first of ``blocks`` (int64) whose bytes in ``data`` do not have the checksum in ``sums``, or -1.

    The calling thread does it all where there is little to do: waking numba's threads takes longer, above all beside others.
    So do threads other than the main one, which may not start numba's: not every layer of them bears two at a time.
    """
    same = np.empty(blocks.size, np.bool_)
    alone = blocks.size <= _FEW or threading.current_thread() is not threading.main_thread()
    (_compare_alone if alone else _compare)(_words(data), blocks, sums, same)
    return -1 if bool(same.all()) else int(blocks[int(np.argmin(same))])


def block_checksums_reference(data: np.ndarray, first: int = 0) -> np.ndarray:
    """Plain Python, see :func:`block_checksums`."""

    def rotate(x: int, count: int) -> int:
        return (x << count | x >> (64 - count)) & _MASK

    def round_(acc: int, word: int) -> int:
        return rotate((acc + word * _P2) & _MASK, 31) * _P1 & _MASK

    words = [int(word) for word in data.view(np.uint64)]
    out = []
    for number in range(data.size // BLOCK):
        seed = first + number
        lanes = [(seed + _P1 + _P2) & _MASK, (seed + _P2) & _MASK, seed, (seed - _P1) & _MASK]
        for at in range(number * BLOCK // 8, (number + 1) * BLOCK // 8, 4):
            lanes = [round_(lane, words[at + j]) for j, lane in enumerate(lanes)]
        h = sum(rotate(lane, count) for lane, count in zip(lanes, (1, 7, 12, 18), strict=True)) & _MASK
        for lane in lanes:
            h = ((h ^ round_(0, lane)) * _P1 + _P4) & _MASK
        h = (h + BLOCK) & _MASK
        h = (h ^ h >> 33) * _P2 & _MASK
        h = (h ^ h >> 29) * _P3 & _MASK
        out.append(h ^ h >> 32)
    return np.array(out, np.uint64)
