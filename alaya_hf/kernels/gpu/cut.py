"""Which tokens get exact attention: the range below the best score, a share of the mass, and a cap per query head."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from alaya_hf.kernels.gpu.layout import TILE
from alaya_hf.kernels.gpu.op import LOG2E, check, next_power_of_2, operator, ordered, unordered

_BLOCK = 16384  # tile maxima held in registers; longer contexts read them again in every round


@triton.jit
def _tile_keys(at, i, tiles):
    bits = tl.load(at + i, mask=i < tiles, other=0.0).to(tl.int16, bitcast=True)
    return tl.where(i < tiles, ordered(bits), -40000)


@triton.jit
def _count_tiles(at, keys, bound, tiles, BLOCK: tl.constexpr, ONE: tl.constexpr):  # type: ignore[no-untyped-def]
    if ONE:
        count = tl.sum((keys >= bound).to(tl.int32))
    else:
        some = tl.zeros([BLOCK], tl.int32)
        begin = tiles * 0
        while begin < tiles:
            some += (_tile_keys(at, begin + tl.arange(0, BLOCK), tiles) >= bound).to(tl.int32)
            begin += BLOCK
        count = tl.sum(some)
    return count


@triton.jit
def _cut(  # type: ignore[no-untyped-def]
    tile_max, scores, best, ml, lengths, ids, counts, thresholds, limits, chosen,
    capacity, partials, window_parts, used, beta, ratio, factor,
    HEADS: tl.constexpr, CAP: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr, ONE: tl.constexpr,
    RATIO: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    n = tl.load(lengths + row // HEADS)
    tiles = (n + 63) // 64
    top = tl.load(best + row)
    floor = top - beta
    at = tile_max + row * capacity
    i = tl.arange(0, BLOCK)
    keys = _tile_keys(at, i, tiles)
    # No more than CAP tiles hold a token of the CAP best: those whose maximum is among the CAP highest maxima.
    start = ordered(floor.to(tl.float16).to(tl.int16, bitcast=True)) - 1
    high = ordered(tl.minimum(top, 65000.0).to(tl.float16).to(tl.int16, bitcast=True)) + 2
    high = tl.maximum(high, start + 1)
    low = start
    within = _count_tiles(at, keys, low, tiles, BLOCK, ONE)
    if within > CAP:
        bound = high
        while bound - low > 1:
            middle = (low + bound) // 2
            enough = _count_tiles(at, keys, middle, tiles, BLOCK, ONE) >= CAP
            low = tl.where(enough, middle, low)
            bound = tl.where(enough, bound, middle)
        within = _count_tiles(at, keys, low, tiles, BLOCK, ONE)
    room = CAP - _count_tiles(at, keys, low + 1, tiles, BLOCK, ONE)  # for tiles that tie with the last one
    found = tiles * 0
    ties = tiles * 0
    begin = tiles * 0
    while begin < tiles:
        if not ONE:
            keys = _tile_keys(at, begin + i, tiles)
        # Exactly those within beta: of the others the pass may not have written the scores.
        flag = (keys >= low) & (begin + i < tiles) & (unordered(keys) >= floor)
        if within > CAP:
            tie = (flag & (keys == low)).to(tl.int32)
            flag = flag & ((keys > low) | (ties + tl.cumsum(tie, 0) <= room))
            ties += tl.sum(tie)
        place = found + tl.cumsum(flag.to(tl.int32), 0) - 1
        tl.store(chosen + row * TILES + place, begin + i, mask=flag & (place < TILES))
        found += tl.sum(flag.to(tl.int32))
        begin += BLOCK
    tl.debug_barrier()  # other threads wrote what is read here
    x = tl.arange(0, TILES)
    tile = tl.load(chosen + row * TILES + x, mask=x < found, other=0)
    token = tile[:, None] * 64 + tl.arange(0, 64)[None, :]
    there = (x < found)[:, None] & (token < n)
    half = tl.load(scores + row * capacity * 64 + token, mask=there, other=0.0)
    keys2 = tl.where(there, ordered(half.to(tl.int16, bitcast=True)), -40000)
    target = 0.0
    mass = tl.zeros([TILES, 64], tl.float32)
    if RATIO:
        part = tl.arange(0, PARTS)
        exponent = tl.load(ml + (row * partials + part) * 2, mask=part < used, other=float("-inf"))
        weight = tl.load(ml + (row * partials + part) * 2 + 1, mask=part < used, other=0.0)
        weight = tl.where(exponent > float("-inf"), weight * tl.exp2(exponent - top * factor), 0.0)
        window = tl.sum(tl.where(part < window_parts, weight, 0.0))
        target = ratio * tl.sum(weight) - window
        mass = tl.where(there, tl.exp2((half.to(tl.float32) - top) * factor), 0.0)
    count = tl.sum((keys2 >= low).to(tl.int32))
    if (count > CAP) | RATIO:
        bound = high
        while bound - low > 1:
            middle = (low + bound) // 2
            taken = keys2 >= middle
            enough = tl.sum(taken.to(tl.int32)) >= CAP
            if RATIO:
                enough = enough | (tl.sum(tl.where(taken, mass, 0.0)) >= target)
            low = tl.where(enough, middle, low)
            bound = tl.where(enough, bound, middle)
    threshold = floor
    if low > start:
        threshold = tl.maximum(floor, unordered(low))
    tl.store(thresholds + row, threshold)
    flag = there & (half.to(tl.float32) >= threshold)
    kept = flag.to(tl.int32)
    limit = 0x7FFFFFFF
    if tl.sum(kept) > CAP:
        # Of the tokens that tie with the threshold, the first ones that there is room for.
        tie = (flag & (half.to(tl.float32) == threshold)).to(tl.int32)
        per_tile = tl.sum(tie, 1)
        rank = (tl.cumsum(per_tile, 0) - per_tile)[:, None] + tl.cumsum(tie, 1)
        fits = rank <= CAP - tl.sum(kept) + tl.sum(tie)
        limit = tl.max(tl.where((tie > 0) & fits, token, -1))
        kept = tl.where((tie > 0) & (fits == 0), 0, kept)
    tl.store(limits + row, limit)
    per_tile = tl.sum(kept, 1)
    place = (tl.cumsum(per_tile, 0) - per_tile)[:, None] + tl.cumsum(kept, 1) - 1
    tl.store(ids + row * CAP + place, token, mask=(kept > 0) & (place < CAP))
    tl.store(counts + row, tl.minimum(tl.sum(per_tile), CAP))


def _warps(block: int, tiles: int) -> int:
    """Enough threads for maxima and candidate scores to fit their registers."""
    elements = max(block, 64 * tiles)
    return 8 if elements <= 4096 else 16 if elements <= 8192 else 32


@operator("cut", mutates=["ids", "counts", "thresholds", "limits", "chosen"])
def cut(
    tile_max: Tensor, scores: Tensor, best: Tensor, ml: Tensor, lengths: Tensor, ids: Tensor, counts: Tensor,
    thresholds: Tensor, limits: Tensor, chosen: Tensor, window_parts: int, parts: int, scaling: float, beta: float, ratio: float,
) -> None:  # fmt: skip
    """Select tokens for exact attention, per query head: at most `cap`, the highest scores first.

    Selected are the tokens within `beta` of the best score, window included; of these as few as hold, with the window, the
    share `ratio` of the attention mass; of these at most `cap`. ``TopK(k)`` is a cap alone (``beta = inf``, ``ratio = 1``).

    Parameters
    ----------
    tile_max, scores, best, lengths
        From the low-bit pass; `best` after the window.
    ml : Tensor ``[batch, kv_heads, group, partials, 2]`` float32
        The window's `window_parts` partials first, then the pass's `parts`. Read where ``ratio < 1``.
    ids : Tensor ``[batch, kv_heads, group, cap]`` int32
        Places in the store, ascending.
    counts : Tensor ``[batch, kv_heads, group]`` int32
    thresholds : Tensor ``[batch, kv_heads, group]`` float32
    limits : Tensor ``[batch, kv_heads, group]`` int32
        Selected is what scores above the threshold, or equals it at a place of at most `limits`.
    chosen : Tensor ``[batch, kv_heads, group, next_power_of_2(cap)]`` int32
        Working memory.

    Notes
    -----
    A bisection over the 65,536 possible scores, first of the tiles' maxima, then of the tokens in the `cap` tiles that can
    matter: cost ``n / 64`` maxima and ``64 * cap`` scores per head, no pass over all scores.
    """
    batch, heads, group, capacity = tile_max.shape
    cap = ids.shape[3]
    check(ids, "ids", (batch, heads, group, None), torch.int32)
    if cap == 0:
        counts.zero_()
        thresholds.fill_(float("inf"))
        limits.fill_(-1)
        return
    size, block = next_power_of_2(cap), min(_BLOCK, next_power_of_2(capacity))
    check(chosen, "chosen", (batch, heads, group, size), torch.int32)
    _cut[(batch * heads * group,)](
        tile_max, scores, best, ml, lengths, ids, counts, thresholds, limits, chosen,
        capacity, ml.shape[3], window_parts, window_parts + parts, beta, ratio, scaling * LOG2E,
        HEADS=heads * group, CAP=cap, TILES=size, BLOCK=block, ONE=capacity <= _BLOCK,
        RATIO=ratio < 1, PARTS=next_power_of_2(window_parts + parts), num_warps=_warps(block, size),
    )  # fmt: skip


def cut_reference(
    tile_max: Tensor, scores: Tensor, best: Tensor, ml: Tensor, lengths: Tensor, ids: Tensor, counts: Tensor,
    thresholds: Tensor, limits: Tensor, chosen: Tensor, window_parts: int, parts: int, scaling: float, beta: float, ratio: float,
) -> None:  # fmt: skip
    """:func:`cut` in plain torch."""
    cap, n = ids.shape[3], scores.shape[3]
    beyond = torch.arange(n, device=scores.device) >= lengths.view(-1, 1, 1, 1)
    s = scores.float().masked_fill(beyond, float("-inf"))
    ordered_s, order = s.sort(dim=-1, descending=True, stable=True)
    keep = (ordered_s >= (best - beta).unsqueeze(-1)) & ~torch.isneginf(ordered_s)
    if ratio < 1:
        used = window_parts + parts
        exponent, weight = ml[..., :used, 0], ml[..., :used, 1]
        shift = (best * scaling * LOG2E).unsqueeze(-1)
        weight = torch.where(torch.isneginf(exponent), 0.0, weight * torch.exp2(exponent - shift))
        target = ratio * weight.sum(-1) - weight[..., :window_parts].sum(-1)
        mass = torch.exp2(ordered_s * scaling * LOG2E - shift)
        keep &= mass.cumsum(-1) - mass < target.unsqueeze(-1)
    keep[..., cap:] = False
    counts.copy_(keep.sum(-1))
    last = ordered_s.gather(-1, (counts.long() - 1).clamp_min(0).unsqueeze(-1)).squeeze(-1)
    thresholds.copy_(torch.where(counts > 0, last, float("inf")))
    place = order.gather(-1, (counts.long() - 1).clamp_min(0).unsqueeze(-1)).squeeze(-1)
    limits.copy_(torch.where(counts > 0, place, -1))
    order = order.masked_fill(~keep, n).sort(dim=-1).values[..., :cap]
    ids[..., : order.shape[-1]] = order.int()


__all__ = ["TILE", "cut", "cut_reference"]
