"""Selection from scores: row maxima, k-th largest, recovery thresholds, and the tokens that reach a threshold."""

from __future__ import annotations

import numpy as np
import torch
from numba import njit, prange

from alaya_hf.kernels.cpu.numeric import FASTMATH, exp2_f32, fmax, splits

__all__ = [
    "kth_largest",
    "kth_largest_reference",
    "recovery_threshold",
    "recovery_threshold_reference",
    "row_max",
    "row_max_reference",
    "select_threshold",
    "select_threshold_reference",
]

_TILE = 64
_BINS = 4096
_RANGE = 40.0  # nats below the maximum that the histogram resolves; e^-40 of the best token is nothing


def _rows(scores: torch.Tensor) -> tuple[np.ndarray, int, int]:
    if scores.ndim != 3 or scores.dtype != torch.float32:
        raise ValueError(
            f"expected float32 scores of shape [kv_heads, group, tokens], got {scores.dtype} {tuple(scores.shape)}"
        )
    heads, group, n = scores.shape
    return scores.contiguous().view(-1).numpy(), heads * group, n


@njit(parallel=True, fastmath=FASTMATH, cache=True, nogil=True, error_model="numpy")
def _row_max(scores, rows, n, parts, best):
    for task in prange(rows * parts):
        row = task // parts
        part = task % parts
        span = scores[row * n + n * part // parts : row * n + n * (part + 1) // parts]
        top = np.float32(-np.inf)
        for i in range(span.size):
            top = fmax(span[i], top)
        best[task] = top


def row_max(scores: torch.Tensor) -> torch.Tensor:
    """Largest score of every query head.

    Parameters
    ----------
    scores : Tensor ``[kv_heads, group, tokens]`` float32

    Returns
    -------
    Tensor ``[kv_heads, group]`` float32
        ``-inf`` without tokens.
    """
    flat, rows, n = _rows(scores)
    parts = splits(rows, n, 4096)
    best = np.full(rows * parts, -np.inf, np.float32)
    if flat.size:
        _row_max(flat, rows, n, parts, best)
    return torch.from_numpy(best.reshape(rows, parts).max(axis=1)).view(scores.shape[:2])


def row_max_reference(scores: torch.Tensor) -> torch.Tensor:
    """:func:`row_max` in plain torch."""
    return scores.amax(-1) if scores.shape[-1] else scores.new_full(scores.shape[:2], -torch.inf)


@njit(parallel=True, fastmath=FASTMATH, cache=True, nogil=True, error_model="numpy")
def _kth_largest(scores, rows, n, k, out):
    for row in prange(rows):
        span = scores[row * n : (row + 1) * n]
        width = max(1, min(_TILE, n // (2 * k)))
        tiles = n // width
        bound = np.float32(-np.inf)
        if width > 1 and tiles >= k:
            # Each of the k best tiles holds one score at least as large, so this is a lower bound.
            tops = np.empty(tiles, np.float32)
            for i in range(tiles):
                top = np.float32(-np.inf)
                tile = span[i * width : (i + 1) * width]
                for t in range(width):
                    top = fmax(tile[t], top)
                tops[i] = top
            bound = np.partition(tops, tiles - k)[tiles - k]
        found = 0
        for i in range(n):
            found += span[i] >= bound
        kept = np.empty(found, np.float32)
        at = 0
        for i in range(n):
            if span[i] >= bound:
                kept[at] = span[i]
                at += 1
        out[row] = np.partition(kept, found - k)[found - k]


def kth_largest(scores: torch.Tensor, k: int) -> torch.Tensor:
    """The `k`-th largest score of every query head: the threshold of a top-k query.

    Parameters
    ----------
    scores : Tensor ``[kv_heads, group, tokens]`` float32
    k : int
        At least 1.

    Returns
    -------
    Tensor ``[kv_heads, group]`` float32
        ``-inf`` where there are fewer than `k` tokens (all of them are then selected).

    Raises
    ------
    ValueError
        Wrong shape or dtype, or ``k < 1``.

    Notes
    -----
    Exact. The maxima of short tiles bound the answer from below; only the few scores above that bound are partitioned.
    """
    if k < 1:
        raise ValueError(f"expected k of at least 1, got {k}")
    flat, rows, n = _rows(scores)
    out = np.full(rows, -np.inf, np.float32)
    if rows and n >= k:
        _kth_largest(flat, rows, n, k, out)
    return torch.from_numpy(out).view(scores.shape[:2])


def kth_largest_reference(scores: torch.Tensor, k: int) -> torch.Tensor:
    """:func:`kth_largest` in plain torch."""
    if scores.shape[-1] < k:
        return scores.new_full(scores.shape[:2], -torch.inf)
    return scores.topk(k, dim=-1).values[..., -1]


@njit(parallel=True, fastmath=FASTMATH, cache=True, nogil=True, error_model="numpy")
def _recovery(scores, rows, n, factor, ratio, extra, out):
    for row in prange(rows):
        span = scores[row * n : (row + 1) * n]
        top = np.float32(-np.inf)
        for i in range(n):
            top = fmax(span[i], top)
        # Base-2 logits relative to the best token; the histogram is over these.
        per_bin = np.float32(_BINS / (_RANGE * 1.4426950408889634))
        masses = np.zeros(_BINS, np.float64)
        rest = 0.0
        weights = np.empty(_TILE, np.float32)
        bins = np.empty(_TILE, np.int32)
        for first in range(0, n, _TILE):
            count = min(_TILE, n - first)
            tile = span[first : first + count]
            for t in range(count):
                x = (tile[t] - top) * factor
                weights[t] = exp2_f32(x)
                bins[t] = np.int32(-fmax(x * per_bin, np.float32(-_BINS)))
            for t in range(count):
                b = bins[t]
                if b < _BINS:
                    masses[b] += weights[t]
                else:
                    rest += weights[t]
        total = rest
        for b in range(_BINS):
            total += masses[b]
        if ratio >= 1.0:  # rounding of the sums must not drop a token
            out[row] = -np.inf
            continue
        # Capped, so that a window that outweighs everything stays finite.
        window = 2.0 ** min(extra[row] * 1.4426950408889634 - top * np.float64(factor), 1000.0)
        needed = ratio * (window + total) - window
        if needed <= 0:
            out[row] = np.inf
            continue
        done = 0.0
        chosen = -1
        for b in range(_BINS):
            if done + masses[b] >= needed:
                chosen = b
                break
            done += masses[b]
        if chosen < 0:
            out[row] = -np.inf
            continue
        # Inside the bin that crosses the ratio, go token by token.
        found = 0
        for i in range(n):
            x = (span[i] - top) * factor
            found += np.int32(-fmax(x * per_bin, np.float32(-_BINS))) == chosen
        inside = np.empty(found, np.float32)
        at = 0
        for i in range(n):
            x = (span[i] - top) * factor
            if np.int32(-fmax(x * per_bin, np.float32(-_BINS))) == chosen:
                inside[at] = span[i]
                at += 1
        inside.sort()
        at = found - 1
        done += exp2_f32((inside[at] - top) * factor)
        while at > 0 and done < needed:
            at -= 1
            done += exp2_f32((inside[at] - top) * factor)
        out[row] = inside[at]


def recovery_threshold(scores: torch.Tensor, scaling: float, ratio: float, extra_lse: torch.Tensor) -> torch.Tensor:
    """Threshold keeping the fewest highest-scoring tokens that, with the window, hold `ratio` of the attention mass.

    Parameters
    ----------
    scores : Tensor ``[kv_heads, group, tokens]`` float32
    scaling : float
        Positive.
    ratio : float
        In ``[0, 1]``.
    extra_lse : Tensor ``[kv_heads, group]`` float32
        Natural log-sum-exp of the logits of what is attended anyway (the window); ``-inf`` for nothing.

    Returns
    -------
    Tensor ``[kv_heads, group]`` float32
        A token's score (tokens with ``score >= threshold`` are kept, ties included); ``+inf`` where the window is
        enough by itself, ``-inf`` where every token is needed (always so for a ratio of 1).

    Raises
    ------
    ValueError
        Wrong shapes or dtypes, or a ratio outside ``[0, 1]``.

    Notes
    -----
    A histogram of mass over 40 nats below the maximum finds the bin in which the ratio is crossed; its tokens are
    then sorted, so the count is minimal up to rounding of the sums. Tokens more than 40 nats down are
    kept only all together.
    """
    if not 0.0 <= ratio <= 1.0:
        raise ValueError(f"expected a recovery ratio within [0, 1], got {ratio}")
    flat, rows, n = _rows(scores)
    if tuple(extra_lse.shape) != tuple(scores.shape[:2]):
        raise ValueError(f"expected extra_lse of shape {tuple(scores.shape[:2])}, got {tuple(extra_lse.shape)}")
    out = np.full(rows, np.inf, np.float32)
    if flat.size:
        extra = extra_lse.detach().to(torch.float64).contiguous().view(-1).numpy()
        _recovery(flat, rows, n, np.float32(scaling * 1.4426950408889634), float(ratio), extra, out)
    return torch.from_numpy(out).view(scores.shape[:2])


def recovery_threshold_reference(
    scores: torch.Tensor, scaling: float, ratio: float, extra_lse: torch.Tensor
) -> torch.Tensor:
    """:func:`recovery_threshold` in plain torch: sorted, cumulated, in float64."""
    if not scores.shape[-1]:
        return scores.new_full(scores.shape[:2], torch.inf)
    ordered = scores.sort(dim=-1, descending=True).values
    logits = ordered.double() * scaling
    extra = extra_lse.double().unsqueeze(-1)
    total = torch.logaddexp(torch.logsumexp(logits, dim=-1, keepdim=True), extra)
    window = torch.exp(extra - total)
    kept = torch.exp(logits - total).cumsum(-1) + window
    count = (kept < ratio).sum(-1)  # index of the token that reaches the ratio
    found = ordered.gather(-1, count.clamp(max=scores.shape[-1] - 1).unsqueeze(-1)).squeeze(-1)
    found = torch.where(count >= scores.shape[-1], -torch.inf, found)
    if ratio == 1.0:
        return torch.full_like(found, -torch.inf)
    return torch.where(window.squeeze(-1) >= ratio, torch.inf, found)


@njit(parallel=True, fastmath=FASTMATH, cache=True, nogil=True, error_model="numpy")
def _count_hits(scores, heads, group, n, thresholds, parts, tile_hits, counts):
    tiles = (n + _TILE - 1) // _TILE
    for task in prange(heads * parts):
        h = task // parts
        part = task % parts
        flags = np.empty(_TILE, np.uint8)
        found = 0
        for i in range(tiles * part // parts, tiles * (part + 1) // parts):
            first = i * _TILE
            count = min(_TILE, n - first)
            some = False
            for g in range(group):
                row = h * group + g
                tile = scores[row * n + first : row * n + first + count]
                top = np.float32(-np.inf)
                for t in range(count):
                    top = fmax(tile[t], top)
                some |= top >= thresholds[row]
            if not some:
                tile_hits[h * tiles + i] = 0
                continue
            flags[:] = 0
            for g in range(group):
                row = h * group + g
                tile = scores[row * n + first : row * n + first + count]
                limit = thresholds[row]
                for t in range(count):
                    flags[t] |= np.uint8(tile[t] >= limit)
            hits = 0
            for t in range(_TILE):
                hits += flags[t]
            tile_hits[h * tiles + i] = hits
            found += hits
        counts[task] = found


@njit(parallel=True, fastmath=FASTMATH, cache=True, nogil=True, error_model="numpy")
def _write_hits(scores, heads, group, n, thresholds, parts, tile_hits, starts, ids, mask, total):
    tiles = (n + _TILE - 1) // _TILE
    for task in prange(heads * parts):
        h = task // parts
        part = task % parts
        at = starts[task]
        for i in range(tiles * part // parts, tiles * (part + 1) // parts):
            if tile_hits[h * tiles + i] == 0:
                continue
            for token in range(i * _TILE, min(n, (i + 1) * _TILE)):
                hit = False
                for g in range(group):
                    row = h * group + g
                    hit |= scores[row * n + token] >= thresholds[row]
                if hit:
                    ids[at] = token
                    for g in range(group):
                        row = h * group + g
                        mask[g * total + at] = scores[row * n + token] >= thresholds[row]
                    at += 1


def select_threshold(scores: torch.Tensor, thresholds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens that reach the threshold of some query head of the group.

    Parameters
    ----------
    scores : Tensor ``[kv_heads, group, tokens]`` float32
    thresholds : Tensor ``[kv_heads, group]`` float32
        ``+inf`` selects nothing, ``-inf`` everything.

    Returns
    -------
    ids : Tensor ``[total]`` int32
        Ascending within a KV head; those of head `h` are ``ids[offsets[h]:offsets[h + 1]]``.
    offsets : Tensor ``[kv_heads + 1]`` int64
    mask : Tensor ``[group, total]`` uint8
        1 where the score of that query head itself reaches its threshold.

    Raises
    ------
    ValueError
        Wrong shapes or dtypes.

    Notes
    -----
    Cost: one read of the scores and a second look at the tiles of 64 tokens with a hit.
    """
    flat, _, n = _rows(scores)
    heads, group, _ = scores.shape
    if tuple(thresholds.shape) != (heads, group):
        raise ValueError(f"expected thresholds of shape [{heads}, {group}], got {tuple(thresholds.shape)}")
    if not flat.size:
        return (
            torch.empty(0, dtype=torch.int32),
            torch.zeros(heads + 1, dtype=torch.int64),
            torch.empty(group, 0, dtype=torch.uint8),
        )
    limits = thresholds.detach().to(torch.float32).contiguous().view(-1).numpy()
    parts = splits(heads, n)
    tile_hits = np.empty(heads * -(-n // _TILE), np.uint8)
    counts = np.zeros(heads * parts, np.int64)
    _count_hits(flat, heads, group, n, limits, parts, tile_hits, counts)
    starts = np.zeros(heads * parts + 1, np.int64)
    np.cumsum(counts, out=starts[1:])
    total = int(starts[-1])
    ids = np.empty(total, np.int32)
    mask = np.empty((group, total), np.uint8)
    _write_hits(flat, heads, group, n, limits, parts, tile_hits, starts, ids, mask.reshape(-1), total)
    return torch.from_numpy(ids), torch.from_numpy(starts[::parts].copy()), torch.from_numpy(mask)


def select_threshold_reference(
    scores: torch.Tensor, thresholds: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """:func:`select_threshold` in plain torch."""
    hits = scores >= thresholds.unsqueeze(-1)
    head, token = hits.any(dim=1).nonzero(as_tuple=True)
    counts = torch.bincount(head, minlength=scores.shape[0])
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    mask = (
        hits[head, :, token].T.to(torch.uint8) if scores.shape[1] else torch.empty(0, token.numel(), dtype=torch.uint8)
    )
    return token.to(torch.int32), offsets, mask.contiguous()
