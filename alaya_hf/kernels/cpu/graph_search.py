"""Graph search on the CPU: DIPRS and top-k beam search, in numba, each beside a plain Python reference.

DIPRS is the search of AlayaDB (arXiv 2504.10326, section 6.1, Algorithm 1); the prefix filter expands one and two hops
as ACORN does (SIGMOD 2024). The kernels read the keys where the store keeps them, see
:func:`alaya_hf.kernels.cpu.numeric.flat_store`; nothing is copied.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.extending import intrinsic

from alaya_hf.kernels.cpu.numeric import load_f32

SCAN = 256  # keys of a prefix so short that all of them are entry points
FAST = {"reassoc", "contract", "nsz", "arcp"}  # NaN and inf keep their meaning: -inf marks "no window"


@intrinsic
def _prefetch(typingctx, array, index):
    """Ask for the cache line that holds element ``index`` (in elements from the start) of a contiguous array."""

    def codegen(context, builder, signature, args):
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        address = builder.bitcast(builder.gep(data, [args[1]]), ir.IntType(8).as_pointer())
        i32 = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [address.type, i32, i32, i32])
        function = builder.module.declare_intrinsic("llvm.prefetch", [address.type], kind)
        builder.call(function, [address, ir.Constant(i32, 0), ir.Constant(i32, 3), ir.Constant(i32, 1)])
        return context.get_dummy_value()

    return types.void(array, types.intp), codegen


@njit(fastmath=FAST)
def _score(q, keys, start, out, row):
    """Write the inner products of ``q [G, d]`` with the stored key at ``keys[start:start + d]`` to ``out[row]``."""
    groups, d = q.shape
    g = 0
    while g + 4 <= groups:  # four queries for one read and one conversion of the key
        s0 = s1 = s2 = s3 = np.float32(0)
        for i in range(d):
            x = load_f32(keys, start + i)
            s0 += q[g, i] * x
            s1 += q[g + 1, i] * x
            s2 += q[g + 2, i] * x
            s3 += q[g + 3, i] * x
        out[row, g], out[row, g + 1], out[row, g + 2], out[row, g + 3] = s0, s1, s2, s3
        g += 4
    while g < groups:
        s0 = np.float32(0)
        for i in range(d):
            s0 += q[g, i] * load_f32(keys, start + i)
        out[row, g] = s0
        g += 1


@njit
def meet(seen, k):
    """Mark key ``k`` in the bit set ``seen``; True when it was not marked before."""
    bit = np.uint64(1) << np.uint64(k & 63)
    word = seen[k >> 6]
    seen[k >> 6] = word | bit
    return (word & bit) == 0


@njit
def _fresh(adjacency, h, c, limit, seen, found):
    """Collect the unmet neighbours of ``c`` with ids below ``limit``; a filtered neighbour stands for its own."""
    count = 0
    for j in range(adjacency.shape[2]):
        k = adjacency[h, c, j]
        if k < 0:
            break
        if not meet(seen, k):
            continue
        if k < limit:
            found[count] = k
            count += 1
            continue
        for i in range(adjacency.shape[2]):
            m = adjacency[h, k, i]
            if m < 0:
                break
            if m < limit and meet(seen, m):
                found[count] = m
                count += 1
    return count


@njit
def _start(entries, adjacency, h, limit, seen, found):
    """Collect the entry points; all keys of a short prefix; keys spread evenly if there are none.

    An entry point beyond ``limit`` is replaced by its nearest neighbour below it. (Slot 0, the next key, is near in the
    text only and comes last.)
    """
    count = 0
    if limit > SCAN:
        for e in range(entries.shape[1]):
            k = entries[h, e]
            if k >= limit:
                beyond = k
                for j in range(1, adjacency.shape[2] + 1):
                    k = adjacency[h, beyond, j % adjacency.shape[2]]
                    if 0 <= k < limit:
                        break
            if 0 <= k < limit and meet(seen, k):
                found[count] = k
                count += 1
    if count == 0:
        count = min(limit, SCAN)
        for e in range(count):
            found[e] = e * limit // count
            meet(seen, found[e])
    return count


@njit(fastmath=FAST)
def _evaluate(q, keys, base, row_stride, found, fresh, local):
    """Score the ``fresh`` collected keys; all reads are asked for before the first is used."""
    step = 64 // keys.itemsize
    for j in range(fresh):
        start = base + found[j] * row_stride
        for line in range(0, q.shape[1], step):
            _prefetch(keys, start + line)
    for j in range(fresh):
        _score(q, keys, base + found[j] * row_stride, local, j)


@njit(fastmath=FAST)
def _next(scores, expanded, size, g):
    """Return the candidate with the highest score for query ``g`` that is not expanded yet, or -1."""
    top = -1
    high = np.float32(-np.inf)
    for c in range(size):
        if scores[c, g] > high and not expanded[c]:
            high = scores[c, g]
            top = c
    return top


@njit(parallel=True, fastmath=FAST, nogil=True, cache=True)
def dipr_search(
    keys, head_stride, row_stride, adjacency, entries, q, heads, window_best, beta, route, l0, max_candidates, limit
):
    """Run DIPRS for every row of queries; a row is one query, or the queries of a group that share one search.

    Returns candidate ids ``[R, max_candidates]``, their scores ``[R, max_candidates, G]``, ``|C| [R]``, the number of
    keys scored ``[R]`` and the best score per query ``[R, G]``; :func:`dipr_search_reference` says what they mean.
    """
    rows, groups, _ = q.shape
    n, degree = adjacency.shape[1], adjacency.shape[2]
    ids = np.empty((rows, max_candidates), np.int32)
    scores = np.empty((rows, max_candidates, groups), np.float32)
    sizes = np.zeros(rows, np.int64)
    touched = np.zeros(rows, np.int64)
    best = window_best.copy()
    for r in prange(rows):
        h = heads[r]
        base = h * head_stride
        seen = np.zeros((n + 63) >> 6, np.uint64)
        room = max(SCAN, entries.shape[1], degree * (degree if limit < n else 1))
        found = np.empty(room, np.int32)
        local = np.empty((room, groups), np.float32)
        expanded = np.zeros(max_candidates, np.uint8)
        qr = q[r]
        size = 0
        fresh = _start(entries, adjacency, h, limit, seen, found)
        step = 0
        while True:  # the entry points of the scan: a best-first walk that takes its queries in turn
            _evaluate(qr, keys, base, row_stride, found, fresh, local)
            touched[r] += fresh
            for j in range(min(fresh, max_candidates - size)):
                ids[r, size] = found[j]
                for g in range(groups):
                    scores[r, size, g] = local[j, g]
                    best[r, g] = max(best[r, g], local[j, g])
                size += 1
            if step >= route:
                break
            c = _next(scores[r], expanded, size, step % groups)
            if c < 0:
                break
            expanded[c] = 1
            step += 1
            fresh = _fresh(adjacency, h, ids[r, c], limit, seen, found)
        kept = 0
        for c in range(size):
            near = False
            for g in range(groups):
                near |= scores[r, c, g] >= best[r, g] - beta[r, g]
            if near:
                ids[r, kept] = ids[r, c]
                expanded[kept] = expanded[c]
                for g in range(groups):
                    scores[r, kept, g] = scores[r, c, g]
                kept += 1
        expanded[kept:size] = 0
        size = kept
        scanned = 0
        while scanned < size:  # DIPRS
            c = ids[r, scanned]
            done = expanded[scanned]
            scanned += 1
            if done:
                continue
            fresh = _fresh(adjacency, h, c, limit, seen, found)
            _evaluate(qr, keys, base, row_stride, found, fresh, local)
            touched[r] += fresh
            for j in range(fresh):
                near = size <= l0
                for g in range(groups):
                    near |= local[j, g] >= best[r, g] - beta[r, g]
                if near and size < max_candidates:
                    k = found[j]
                    ids[r, size] = k
                    for line in range(0, degree, 16):
                        _prefetch(adjacency, (h * n + k) * degree + line)
                    for g in range(groups):
                        scores[r, size, g] = local[j, g]
                        best[r, g] = max(best[r, g], local[j, g])
                    size += 1
        sizes[r] = size
    return ids, scores, sizes, touched, best


@njit(nogil=True, cache=True)
def collect(ids, scores, sizes, best, beta):
    """Turn candidate lists into the answer: CSR per query of ids (in the order of C) and scores."""
    rows, _, groups = scores.shape
    offsets = np.zeros(rows * groups + 1, np.int64)
    for r in range(rows):
        for g in range(groups):
            count = 0
            for c in range(sizes[r]):
                count += scores[r, c, g] >= best[r, g] - beta[r, g]
            offsets[r * groups + g + 1] = offsets[r * groups + g] + count
    out = np.empty(offsets[-1], np.int32)
    values = np.empty(offsets[-1], np.float32)
    for r in range(rows):
        for g in range(groups):
            at = offsets[r * groups + g]
            for c in range(sizes[r]):
                if scores[r, c, g] >= best[r, g] - beta[r, g]:
                    out[at] = ids[r, c]
                    values[at] = scores[r, c, g]
                    at += 1
    return out, offsets, values


@njit(parallel=True, fastmath=FAST, nogil=True, cache=True)
def topk_search(keys, head_stride, row_stride, adjacency, entries, q, heads, ef, k, limit):
    """Best-first beam search of width ``ef`` for the ``k`` largest inner products of each query ``q [R, d]``.

    Returns ids ``[R, k]`` int32 (-1 where fewer were found), scores ``[R, k]`` float32, largest first, and the
    number of keys scored ``[R]``.
    """
    rows = q.shape[0]
    n, degree = adjacency.shape[1], adjacency.shape[2]
    ids = np.full((rows, ef), -1, np.int32)
    scores = np.full((rows, ef), -np.inf, np.float32)
    touched = np.zeros(rows, np.int64)
    for r in prange(rows):
        h = heads[r]
        seen = np.zeros((n + 63) >> 6, np.uint64)
        room = max(SCAN, entries.shape[1], degree * (degree if limit < n else 1))
        found = np.empty(room, np.int32)
        local = np.empty((room, 1), np.float32)
        expanded = np.zeros(ef, np.bool_)
        qr = q[r : r + 1]
        size = 0
        fresh = _start(entries, adjacency, h, limit, seen, found)
        while True:
            _evaluate(qr, keys, h * head_stride, row_stride, found, fresh, local)
            touched[r] += fresh
            for j in range(fresh):
                score = local[j, 0]
                if size == ef and not score > scores[r, ef - 1]:
                    continue
                slot = min(size, ef - 1)
                while slot > 0 and scores[r, slot - 1] < score:
                    ids[r, slot] = ids[r, slot - 1]
                    scores[r, slot] = scores[r, slot - 1]
                    expanded[slot] = expanded[slot - 1]
                    slot -= 1
                ids[r, slot] = found[j]
                scores[r, slot] = score
                expanded[slot] = False
                size = min(size + 1, ef)
            c = 0
            while c < size and expanded[c]:
                c += 1
            if c == size:
                break
            expanded[c] = True
            fresh = _fresh(adjacency, h, ids[r, c], limit, seen, found)
    return ids[:, :k], scores[:, :k], touched


def dipr_search_reference(keys, adjacency, entries, q, window_best, beta, route, l0, max_candidates, limit):
    """Search one row in plain Python: what :func:`dipr_search` computes, as it is defined.

    ``DIPRS(G, q, k0, l0, beta)``: the candidate list C starts with the entry points ``k0`` and is scanned in order;
    an unvisited neighbour ``k`` of the current element is appended iff ``|C| <= l0`` or ``q.k >= best - beta``, where
    ``best`` is the maximum over C and over the window. What remains of C, ``q.c >= best - beta``, is the answer.

    The paper leaves ``k0`` open. Here a best-first walk of ``route`` expansions chooses it: from the graph's entry
    points it expands the best key scored so far; of all keys it scored, those within ``beta`` of the best become
    ``k0``. The keys it expanded are not expanded again. With ``route = 0``, ``k0`` are the graph's entry points.

    The queries of one row share the search: they take turns in the walk, and a key is appended when it is near enough
    for any of them. Each still gets its own answer by its own threshold.

    Parameters
    ----------
    keys : ndarray ``[n, d]`` float32
    adjacency : ndarray ``[n, degree]`` int32, -1 after the last neighbour.
    entries : ndarray ``[E]`` int32
    q : ndarray ``[G, d]`` float32
    window_best : ndarray ``[G]``, maximum score in the window, -inf without one.
    beta : ndarray ``[G]``, at least 0.
    route, l0, max_candidates : int
    limit : int
        Prefix filter: only ids below it are scored. A neighbour beyond it stands for its own neighbours (ACORN).

    Returns
    -------
    ids : list of lists of int, one per query, in the order of C.
    touched : int, keys scored.
    """
    score = keys.astype(np.float32) @ q.astype(np.float32).T
    best = np.array(window_best, np.float32)
    visited: set[int] = set()

    def unvisited(around):
        out = []
        for k in around:
            if k >= 0 and k not in visited:
                visited.add(k)
                if k < limit:
                    out.append(k)
                else:
                    hop = [int(m) for m in adjacency[k] if 0 <= m < limit]
                    for m in hop:
                        if m not in visited:
                            visited.add(m)
                            out.append(m)
        return out

    def near(k):
        return bool((score[k] >= best - beta).any())

    start: list[int] = []
    for e in entries.tolist() if limit > SCAN else []:
        inside = [e] if e < limit else [k for k in np.roll(adjacency[e], -1).tolist() if 0 <= k < limit]
        start += [k for k in inside[:1] if k >= 0]
    if not start:
        spread = min(limit, SCAN)
        start = [e * limit // spread for e in range(spread)]
    fresh = unvisited(start)
    pool: list[int] = []
    expanded: set[int] = set()
    touched = 0
    for step in range(route + 1):
        touched += len(fresh)
        fresh = fresh[: max_candidates - len(pool)]
        pool += fresh
        for k in fresh:
            best = np.maximum(best, score[k])
        rest = [k for k in pool if k not in expanded]
        if step == route or not rest:
            break
        c = max(rest, key=lambda k: score[k, step % len(q)])
        expanded.add(c)
        fresh = unvisited(adjacency[c].tolist())
    candidates = [k for k in pool if near(k)]
    for c in candidates:  # grows while it is scanned
        if c in expanded:
            continue
        fresh = unvisited(adjacency[c].tolist())
        touched += len(fresh)
        for k in fresh:
            if (len(candidates) <= l0 or near(k)) and len(candidates) < max_candidates:
                candidates.append(k)
                best = np.maximum(best, score[k])
    return [[k for k in candidates if score[k, g] >= best[g] - beta[g]] for g in range(len(q))], touched
