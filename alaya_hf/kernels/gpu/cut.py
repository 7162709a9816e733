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
def _count_tiles(at, keys, bound, tiles, BLOCK: tl.constexpr, ONE: tl.constexpr):
    if ONE:
        count = tl.sum((keys >= bound).to(tl.int32))
    else:
        some = tl.zeros([BLOCK], tl.int32)
        for begin in range(0, tiles, BLOCK):
            some += (_tile_keys(at, begin + tl.arange(0, BLOCK), tiles) >= bound).to(tl.int32)
        count = tl.sum(some)
    return count


@triton.jit
def _cut(
    tile_max, scores, best, ml, lengths, ids, counts, thresholds, chosen,
    capacity, partials, used, beta, ratio, factor,
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
    low = ordered(floor.to(tl.float16).to(tl.int16, bitcast=True)) - 1
    high = ordered(tl.minimum(top, 65000.0).to(tl.float16).to(tl.int16, bitcast=True)) + 2
    high = tl.maximum(high, low + 1)
    if _count_tiles(at, keys, low, tiles, BLOCK, ONE) > CAP:
        bound = high
        while bound - low > 1:
            middle = (low + bound) // 2
            enough = _count_tiles(at, keys, middle, tiles, BLOCK, ONE) >= CAP
            low = tl.where(enough, middle, low)
            bound = tl.where(enough, bound, middle)
    found = tl.zeros([], tl.int32)
    for begin in range(0, tiles, BLOCK):
        if not ONE:
            keys = _tile_keys(at, begin + i, tiles)
        flag = (keys >= low) & (begin + i < tiles)
        place = found + tl.cumsum(flag.to(tl.int32), 0) - 1
        tl.store(chosen + row * TILES + place, begin + i, mask=flag & (place < TILES))
        found += tl.sum(flag.to(tl.int32))
    tl.debug_barrier()  # other threads wrote what is read here
    x = tl.arange(0, TILES)
    tile = tl.load(chosen + row * TILES + x, mask=x < found, other=0)
    token = tile[:, None] * 64 + tl.arange(0, 64)[None, :]
    there = (x < found)[:, None] & (token < n)
    half = tl.load(scores + row * capacity * 64 + token, mask=there, other=0.0)
    keys2 = tl.where(there, ordered(half.to(tl.int16, bitcast=True)), -40000)
    target = 0.0
    if RATIO:
        part = tl.arange(0, PARTS)
        e = tl.load(ml + (row * partials + part) * 2, mask=part < used, other=float("-inf"))
        w = tl.load(ml + (row * partials + part) * 2 + 1, mask=part < used, other=0.0)
        # The window's share counts: `ratio` of everything, less what the window holds (ratio is of the whole).
        shift = top * factor
        mass = tl.where(there, tl.exp2(half.to(tl.float32) * factor - shift), 0.0)
        everything = tl.sum(tl.where(e > float("-inf"), w * tl.exp2(e - shift), 0.0))
        scanned = tl.load(thresholds + row)  # the scan's part, put there by _scanned
        target = ratio * everything - (everything - scanned * tl.exp2(tl.load(ml + row * partials * 2) * 0.0))
    else:
        mass = tl.zeros([TILES, 64], tl.float32)
    count = tl.sum((keys2 >= low).to(tl.int32))
    threshold = floor
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
        threshold = tl.maximum(floor, unordered(low))
    tl.store(thresholds + row, threshold)
    flag = there & (half.to(tl.float32) >= threshold)
    flat = tl.reshape(flag, [TILES * 64]).to(tl.int32)
    place = tl.cumsum(flat, 0) - 1
    tl.store(ids + row * CAP + place, tl.reshape(token, [TILES * 64]), mask=(flat > 0) & (place < CAP))
    tl.store(counts + row, tl.minimum(tl.sum(flat), CAP))
