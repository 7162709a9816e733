"""The tile loop shared by the CPU attention kernels: tile scores, online softmax, weighted values, merge of splits.

A tile is up to 64 tokens of one KV head for all query heads of its group, so that each key and value byte is read once.
Inside the kernels logits are kept in base 2 (queries are multiplied by ``scaling * log2(e)`` beforehand).
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit, prange

from alaya_hf.kernels.cpu.numeric import (
    FASTMATH,
    LN2,
    LOG2E,
    dot_2x4,
    dot_4x1,
    exp2_f32,
    fmax,
    prefetch,
    update_4x1,
    update_4x4,
)

__all__ = [
    "TILE",
    "padded_group",
    "pad_queries",
    "attend",
    "tile_scores",
    "tile_update",
    "softmax_tile",
    "combine",
    "fill_rows",
]

TILE = 64
# Stands for "no maximum yet"; finite so that (-inf) - NO_MAX is -inf and never nan.
NO_MAX = np.float32(-1e30)


def padded_group(group: int) -> int:
    """Rows needed for a group: three left-over heads are handled as four, the fourth a row of zeros."""
    return group + 1 if group % 4 == 3 else group


def pad_queries(q: torch.Tensor, factor: float = 1.0) -> np.ndarray:
    """Flat copy of the queries times `factor`, groups padded to :func:`padded_group` rows."""
    heads, group, d = q.shape
    rows = padded_group(group)
    scaled = q.detach() * factor if factor != 1.0 else q.detach()
    if rows != group:
        scaled = torch.cat([scaled, scaled.new_zeros(heads, rows - group, d)], dim=1)
    return scaled.contiguous().view(-1).numpy()


@njit(fastmath=FASTMATH, cache=True, nogil=True, error_model="numpy")
def _fetch_row(store, at, d):
    """Prefetch the `d` elements from `at`; addresses past the end do no harm."""
    step = 64 // store.itemsize
    for c in range(0, d, step):
        prefetch(store, at + c)


@njit(fastmath=FASTMATH, cache=True, nogil=True, error_model="numpy")
def tile_scores(s, q, q_at, group, d, store, base, count, ahead, ahead_shift):
    """Inner products of a group with `count` gathered rows, into ``s[group row, token]``; pads to a multiple of 4.

    Meanwhile the rows ``ahead[t] + ahead_shift`` are prefetched: hardware prefetchers stop at every page, which with
    small pages is every fourth token.
    """
    padded = (count + 3) // 4 * 4
    for t in range(count, padded):
        base[t] = base[count - 1]
    g = 0
    while g + 3 <= group:
        for t in range(0, padded, 2):
            if g == 0:
                _fetch_row(store, ahead[t] + ahead_shift, d)
                _fetch_row(store, ahead[t + 1] + ahead_shift, d)
            dot_2x4(s, g * TILE, TILE, q, q_at + g * d, d, store, base, t)
        g += 4
    while g < group:
        for t in range(0, padded, 4):
            if g == 0:
                for i in range(4):
                    _fetch_row(store, ahead[t + i] + ahead_shift, d)
            dot_4x1(s, g * TILE, TILE, q, q_at + g * d, d, store, base, t)
        g += 1


@njit(fastmath=FASTMATH, cache=True, nogil=True, error_model="numpy")
def tile_update(acc, acc_at, group, d, p, store, base, count, shift, ahead, look):
    """Add the rows of a tile, weighted by ``p``, to the group's accumulators. ``p`` is 0 in the padding.

    With `look`, the rows ``ahead[t]`` are prefetched meanwhile.
    """
    g = 0
    while g + 3 <= group:
        for t in range(0, count, 4):
            if look and g == 0:
                for i in range(4):
                    _fetch_row(store, ahead[t + i], d)
            update_4x4(acc, acc_at + g * d, d, p, g * TILE, TILE, store, base, t, shift)
        g += 4
    while g < group:
        for t in range(0, count, 4):
            if look and g == 0:
                for i in range(4):
                    _fetch_row(store, ahead[t + i], d)
            update_4x1(acc, acc_at + g * d, d, p, g * TILE, TILE, store, base, t, shift)
        g += 1


@njit(fastmath=FASTMATH, cache=True, nogil=True, error_model="numpy")
def softmax_tile(s, group, count, m, norm, acc, acc_at, d, at):
    """One step of the online softmax: base-2 logits ``s`` become weights; ``m``, ``norm`` and ``acc`` follow."""
    padded = (count + 3) // 4 * 4
    for g in range(group):
        row = s[g * TILE : g * TILE + padded]
        for t in range(count, padded):
            row[t] = -np.inf
        top = NO_MAX
        for t in range(padded):
            top = fmax(row[t], top)
        old = m[at + g]
        if top > old:
            m[at + g] = top
            factor = exp2_f32(old - top)
            norm[at + g] *= factor
            rescaled = acc[acc_at + g * d : acc_at + (g + 1) * d]
            for c in range(d):
                rescaled[c] *= factor
        else:
            top = old
        total = np.float32(0.0)
        for t in range(padded):
            w = exp2_f32(row[t] - top)
            row[t] = w
            total += w
        norm[at + g] += total


@njit(fastmath=FASTMATH, cache=True, nogil=True, error_model="numpy")
def fill_rows(base, first, last, head_at, ids, use_ids, d):
    """Element offsets of the tokens at up to a tile of positions."""
    for t in range(min(TILE, last - first)):
        token = np.int64(ids[first + t]) if use_ids else first + t
        base[t] = head_at + token * 2 * d


@njit(fastmath=FASTMATH, cache=True, nogil=True, error_model="numpy")
def _attend_range(q, q_at, group, d, store, head_at, ids, use_ids, first, last, mask, masked, total, m, norm, at, acc):
    rows = group + 1 if group % 4 == 3 else group
    s = np.zeros(rows * TILE, np.float32)
    base = np.zeros(TILE, np.int64)
    ahead = np.zeros(TILE, np.int64)
    fill_rows(ahead, first, last, head_at, ids, use_ids, d)
    i = first
    while i < last:
        count = min(TILE, last - i)
        base, ahead = ahead, base
        fill_rows(ahead, i + count, last, head_at, ids, use_ids, d)
        tile_scores(s, q, q_at, group, d, store, base, count, base, d)
        if masked:
            for g in range(group):
                for t in range(count):
                    if mask[g * total + i + t] == 0:
                        s[g * TILE + t] = -np.inf
        softmax_tile(s, group, count, m, norm, acc, at * d, d, at)
        tile_update(acc, at * d, group, d, s, store, base, count, d, ahead, True)
        i += count


@njit(parallel=True, fastmath=FASTMATH, cache=True, nogil=True, error_model="numpy")
def _attend(q, group, rows, d, store, stride, ids, use_ids, lo, hi, mask, masked, total, parts, m, norm, acc):
    heads = lo.size
    for task in prange(heads * parts):
        h = task // parts
        part = task % parts
        n = hi[h] - lo[h]
        first = lo[h] + n * part // parts
        last = lo[h] + n * (part + 1) // parts
        at = task * rows
        _attend_range(
            q,
            h * rows * d,
            group,
            d,
            store,
            h * stride,
            ids,
            use_ids,
            first,
            last,
            mask,
            masked,
            total,
            m,
            norm,
            at,
            acc,
        )


@njit(fastmath=FASTMATH, cache=True, nogil=True, error_model="numpy")
def combine(m, norm, acc, heads, parts, group, rows, d, out, lse):
    """Merge the splits of every row exactly by their log-sum-exp; natural logarithms from here on."""
    for h in range(heads):
        for g in range(group):
            top = NO_MAX
            for part in range(parts):
                top = fmax(m[(h * parts + part) * rows + g], top)
            total = np.float32(0.0)
            target = (h * group + g) * d
            for part in range(parts):
                at = (h * parts + part) * rows + g
                w = exp2_f32(m[at] - top)
                total += w * norm[at]
                for c in range(d):
                    out[target + c] += w * acc[at * d + c]
            if total > 0:
                for c in range(d):
                    out[target + c] /= total
                lse[h * group + g] = np.float32(LN2) * top + np.log(total)
            else:
                for c in range(d):
                    out[target + c] = 0
                lse[h * group + g] = -np.inf


_NO_IDS = np.empty(0, np.int32)
_NO_MASK = np.empty(0, np.uint8)


def attend(q, store, stride, lo, hi, parts, scaling, ids=None, mask=None):  # type: ignore[no-untyped-def]
    """Attention of every group to the token positions ``[lo[h], hi[h])``, through `ids` where given.

    Parameters
    ----------
    q : Tensor ``[kv_heads, group, head_dim]`` float32
    store, stride
        From :func:`~alaya_hf.kernels.cpu.numeric.flat_store`.
    lo, hi : ndarray ``[kv_heads]`` int64
        Range of positions per KV head.
    parts : int
        Splits per KV head.
    scaling : float
    ids : ndarray int32, optional
        Token id of each position; positions are token ids when absent.
    mask : ndarray ``[group * positions]`` uint8, optional

    Returns
    -------
    out : Tensor ``[kv_heads, group, head_dim]`` float32
    lse : Tensor ``[kv_heads, group]`` float32
    """
    heads, group, d = q.shape
    rows = padded_group(group)
    out = torch.zeros(heads, group, d)
    lse = torch.full((heads, group), float("-inf"))
    if heads * group * d == 0 or not (hi > lo).any():
        return out, lse
    m = np.full(heads * parts * rows, NO_MAX, np.float32)
    norm = np.zeros(heads * parts * rows, np.float32)
    acc = np.zeros(heads * parts * rows * d, np.float32)
    flat_q = pad_queries(q, scaling * LOG2E)
    total = 0 if ids is None else ids.size
    _attend(
        flat_q, group, rows, d, store, stride, _NO_IDS if ids is None else ids, ids is not None, lo, hi,
        _NO_MASK if mask is None else mask, mask is not None, total, parts, m, norm, acc,
    )  # fmt: skip
    combine(m, norm, acc, heads, parts, group, rows, d, out.view(-1).numpy(), lse.view(-1).numpy())
    return out, lse
