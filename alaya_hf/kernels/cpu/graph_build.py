"""Construction of the key graph on the CPU, in numba: projection, neighbour search, diversity pruning, back edges.

The steps are RoarGraph's (VLDB 2024, sections 4.2-4.4): a bipartite graph from sampled queries to their nearest keys is
projected onto the keys, and every key is then linked through a search of the graph. Kernels read one head's
keys from a flat float32 array: key ``k`` starts at ``base + k * stride``. Distances between keys are squared Euclidean.

An adjacency row holds neighbour ids followed by -1. Slot 0 is the next key of the context (the last key points to the
first): a ring that keeps every key reachable whatever the pruning removes.
"""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from alaya_hf.kernels.cpu.graph_search import FAST, meet

_PRUNED_FROM = 96  # candidates, nearest first, that diversity pruning looks at


@njit(fastmath=FAST)
def _distance(keys, a, b, d):
    """Return the squared Euclidean distance of the stored keys that start at ``a`` and ``b``."""
    total = np.float32(0)
    for i in range(d):
        t = keys[a + i] - keys[b + i]
        total += t * t
    return total


@njit
def _holds(row, count, k):
    for j in range(count):
        if row[j] == k:
            return True
    return False


@njit(fastmath=FAST)
def _prune(keys, base, stride, d, v, candidates, distances, row, n):
    """Write to ``row`` the next key, then the candidates that no nearer neighbour occludes, then the nearest others.

    A candidate is occluded when a neighbour already chosen is closer to it than ``v`` is (the MRNG rule).
    """
    degree = row.shape[0]
    order = np.argsort(distances)[:_PRUNED_FROM]
    count = 0
    if n > 1:
        row[0] = (v + 1) % n
        count = 1
    for fill in range(2):
        for j in order:
            if count == degree:
                break
            k = candidates[j]
            if k == v or _holds(row, count, k):
                continue
            occluded = False
            if fill == 0:
                for i in range(count):
                    if _distance(keys, base + row[i] * stride, base + k * stride, d) < distances[j]:
                        occluded = True
                        break
            if not occluded:
                row[count] = k
                count += 1
    for j in range(count, degree):
        row[j] = -1


@njit(parallel=True, fastmath=FAST, nogil=True, cache=True)
def project(keys, base, stride, d, nearest, pointers, lists, per_key, adjacency):
    """Project the bipartite graph of queries and keys onto the keys.

    Every key that is among the nearest of some query becomes a pivot (RoarGraph: only the very nearest key of each
    query; attention has sinks that are nearest to almost every query, and a graph of sinks only would be a star).
    Its candidates are the other keys in the lists of at most ``per_key`` of these queries, spread evenly over them.

    Parameters
    ----------
    nearest : ``[m, K]`` int32, the keys nearest to each query, nearest first.
    pointers, lists : CSR ``[n + 1]``, ``[m * K]`` int64: for each key the flat positions in ``nearest`` that hold it.
    adjacency : ``[n, degree]`` int32, written; rows of keys that no query found are left as they are.
    """
    n = pointers.shape[0] - 1
    width = nearest.shape[1]
    for v in prange(n):
        begin, stop = pointers[v], pointers[v + 1]
        take = min(per_key, stop - begin)
        if take == 0:
            continue
        found = np.empty(take * width, np.int32)
        for t in range(take):
            found[t * width : (t + 1) * width] = nearest[lists[begin + t * (stop - begin) // take] // width]
        found = np.unique(found)
        distances = np.empty(found.shape[0], np.float32)
        for j in range(found.shape[0]):
            distances[j] = _distance(keys, base + v * stride, base + found[j] * stride, d)
        _prune(keys, base, stride, d, v, found, distances, adjacency[v], n)


@njit(parallel=True, fastmath=FAST, nogil=True, cache=True)
def neighbours(keys, base, stride, d, adjacency, entries, first, last, known, width):
    """Search the graph for the nearest keys of each of the keys ``first .. last``: a best-first beam of ``width``.

    Returns ids ``[last - first, width]`` int32 (-1 where fewer were found) and squared distances float32. Besides the
    entry points (those below ``known``) the walk starts at the keys just before.
    """
    ids = np.full((last - first, width), -1, np.int32)
    distances = np.full((last - first, width), np.inf, np.float32)
    degree = adjacency.shape[1]
    for t in prange(last - first):
        v = first + t
        seen = np.zeros((adjacency.shape[0] + 63) >> 6, np.uint64)
        expanded = np.zeros(width, np.bool_)
        meet(seen, v)
        size = 0
        found = np.empty(entries.shape[0] + 2 + degree, np.int32)
        fresh = 0
        for e in range(entries.shape[0]):
            if entries[e] < known and meet(seen, entries[e]):
                found[fresh] = entries[e]
                fresh += 1
        for back in range(1, 3):
            if v - back >= 0 and meet(seen, v - back):
                found[fresh] = v - back
                fresh += 1
        while True:
            for j in range(fresh):
                k = found[j]
                distance = _distance(keys, base + v * stride, base + k * stride, d)
                if size == width and not distance < distances[t, width - 1]:
                    continue
                slot = min(size, width - 1)
                while slot > 0 and distances[t, slot - 1] > distance:
                    ids[t, slot] = ids[t, slot - 1]
                    distances[t, slot] = distances[t, slot - 1]
                    expanded[slot] = expanded[slot - 1]
                    slot -= 1
                ids[t, slot] = k
                distances[t, slot] = distance
                expanded[slot] = False
                size = min(size + 1, width)
            c = 0
            while c < size and expanded[c]:
                c += 1
            if c == size:
                break
            expanded[c] = True
            fresh = 0
            for j in range(degree):
                k = adjacency[ids[t, c], j]
                if k < 0:
                    break
                if meet(seen, k):
                    found[fresh] = k
                    fresh += 1
    return ids, distances


@njit(parallel=True, fastmath=FAST, nogil=True, cache=True)
def connect(keys, base, stride, d, adjacency, first, ids, distances, n):
    """Give the keys from ``first`` on the neighbours found for them, besides the ones they have."""
    for t in prange(ids.shape[0]):
        v = first + t
        row = adjacency[v]
        candidates = np.empty(ids.shape[1] + row.shape[0], np.int32)
        lengths = np.empty(candidates.shape[0], np.float32)
        count = 0
        for j in range(ids.shape[1]):
            if ids[t, j] < 0:
                break
            candidates[count] = ids[t, j]
            lengths[count] = distances[t, j]
            count += 1
        for j in range(row.shape[0]):
            k = row[j]
            if k >= 0 and not _holds(candidates, count, k):
                candidates[count] = k
                lengths[count] = _distance(keys, base + v * stride, base + k * stride, d)
                count += 1
        _prune(keys, base, stride, d, v, candidates[:count], lengths[:count], row, n)


@njit(parallel=True, fastmath=FAST, nogil=True, cache=True)
def connect_back(keys, base, stride, d, adjacency, sources, pointers, targets, n):
    """Add the edges ``target -> source``; ``sources[pointers[t]:pointers[t + 1]]`` belong to ``targets[t]``.

    A row that overflows is pruned again.
    """
    degree = adjacency.shape[1]
    for t in prange(targets.shape[0]):
        u = targets[t]
        row = adjacency[u]
        count = 0
        while count < degree and row[count] >= 0:
            count += 1
        begin, stop = pointers[t], pointers[t + 1]
        candidates = np.empty(count + stop - begin, np.int32)
        candidates[:count] = row[:count]
        total = count
        for j in range(begin, stop):
            if not _holds(row, count, sources[j]):
                candidates[total] = sources[j]
                total += 1
        if total <= degree:
            row[:total] = candidates[:total]
            continue
        distances = np.empty(total, np.float32)
        for j in range(total):
            distances[j] = _distance(keys, base + u * stride, base + candidates[j] * stride, d)
        _prune(keys, base, stride, d, u, candidates[:total], distances, row, n)
