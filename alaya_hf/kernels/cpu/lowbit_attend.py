"""The residual partial: attention to every token that was not retrieved, from approximate scores and low-bit values."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import njit, prange, types
from numba.extending import intrinsic

from alaya_hf.kernels.cpu.lowbit import VALUE_GROUP, LowBitKV
from alaya_hf.kernels.cpu.numeric import (
    _F32,
    _FM,
    _I32,
    _I64,
    FASTMATH,
    LN2,
    LOG2E,
    VL,
    _at,
    _data,
    _splat,
    as_numpy,
    exp2_f32,
    fmax,
    splits,
)
from alaya_hf.kernels.cpu.tiles import NO_MAX, TILE, padded_group, tile_update
from alaya_hf.kernels.partial import Partial

__all__ = ["lowbit_attention", "lowbit_attention_reference"]


def _make_unpack(bits: int, width: int) -> Any:
    """Dequantise one group of `width` channels of one token to float32."""
    per_plane = width * bits // 8

    @intrinsic
    def unpack(typingctx, out, out_at, codes, codes_at, params, params_at):  # type: ignore[no-untyped-def]
        n = types.intp
        sig = types.void(out, n, codes, n, params, n)

        def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
            o_ptr, c_ptr, p_ptr = (
                _data(context, builder, ty, args[i]) for ty, i in ((out, 0), (codes, 2), (params, 4))
            )
            raw = ir.VectorType(ir.IntType(8), per_plane)

            def half(shift: int) -> ir.Value:
                bits16 = builder.load(_at(builder, p_ptr, builder.add(args[5], ir.Constant(_I64, shift))))
                wide = builder.fpext(builder.bitcast(bits16, ir.HalfType()), _F32)
                return _splat(builder, wide, lanes)

            packed = builder.load(_at(builder, c_ptr, args[3], raw), align=1)
            pieces = []
            for p in range(8 // bits):
                shift, mask = (ir.Constant(raw, [x] * per_plane) for x in (bits * p, (1 << bits) - 1))
                pieces.append(builder.and_(builder.lshr(packed, shift), mask))
            while len(pieces) > 1 and pieces[0].type.count < VL:  # neighbouring planes side by side fill a vector
                both = ir.Constant(ir.VectorType(_I32, 2 * pieces[0].type.count), list(range(2 * pieces[0].type.count)))
                pieces = [builder.shuffle_vector(x, y, both) for x, y in zip(pieces[::2], pieces[1::2], strict=True)]
            lanes = ir.VectorType(_F32, pieces[0].type.count)
            step, offset = half(0), half(1)
            for i, code in enumerate(pieces):
                x = builder.sitofp(builder.zext(code, ir.VectorType(_I32, lanes.count)), lanes)
                x = builder.fadd(builder.fmul(x, step, flags=_FM), offset, flags=_FM)
                where = _at(builder, o_ptr, builder.add(args[1], ir.Constant(_I64, i * lanes.count)), lanes)
                builder.store(x, where, align=4)
            return context.get_dummy_value()

        return sig, codegen

    return unpack


_unpack_2_32, _unpack_2_16 = _make_unpack(2, 32), _make_unpack(2, 16)
_unpack_4_32, _unpack_4_16 = _make_unpack(4, 32), _make_unpack(4, 16)


@njit(fastmath=FASTMATH, cache=True, nogil=True, error_model="numpy")
def _unpack_tile(values, codes, params, token, count, d, bits):
    """Dequantise the values of `count` tokens into ``values[token, channel]``."""
    groups = (d + VALUE_GROUP - 1) // VALUE_GROUP
    full = d // VALUE_GROUP
    size = VALUE_GROUP * bits // 8
    for t in range(count):
        c_at = (token + t) * (d * bits // 8)
        p_at = (token + t) * groups * 2
        v_at = t * d
        for i in range(full):
            if bits == 2:
                _unpack_2_32(values, v_at + i * VALUE_GROUP, codes, c_at + i * size, params, p_at + 2 * i)
            else:
                _unpack_4_32(values, v_at + i * VALUE_GROUP, codes, c_at + i * size, params, p_at + 2 * i)
        if groups > full:
            if bits == 2:
                _unpack_2_16(values, v_at + full * VALUE_GROUP, codes, c_at + full * size, params, p_at + 2 * full)
            else:
                _unpack_4_16(values, v_at + full * VALUE_GROUP, codes, c_at + full * size, params, p_at + 2 * full)


@njit(fastmath=FASTMATH, cache=True, nogil=True, error_model="numpy")
def _tile_logits(scores, at, count, threshold, skipped, skipped_at, has_skipped, factor, s, s_at):
    """Base-2 logits of a tile, -inf where the token is left out or past the end. Returns the largest."""
    top = NO_MAX
    row = scores[at : at + count]
    to = s[s_at : s_at + TILE]
    for t in range(count):
        x = row[t] * factor if row[t] < threshold else np.float32(-np.inf)
        to[t] = x
        top = fmax(x, top)
    if has_skipped:
        top = NO_MAX
        flags = skipped[skipped_at : skipped_at + count]
        for t in range(count):
            x = np.float32(-np.inf) if flags[t] else to[t]
            to[t] = x
            top = fmax(x, top)
    for t in range(count, TILE):
        to[t] = -np.inf
    return top


@njit(parallel=True, fastmath=FASTMATH, cache=True, nogil=True, error_model="numpy")
def _tile_masses(scores, heads, group, n, thresholds, skipped, has_skipped, factor, parts, tops, masses):
    """Maximum logit of every tile and row, and the mass ``sum 2^(logit - maximum)`` under it."""
    tiles = (n + TILE - 1) // TILE
    for task in prange(heads * parts):
        h = task // parts
        part = task % parts
        s = np.empty(TILE, np.float32)
        for i in range(tiles * part // parts, tiles * (part + 1) // parts):
            count = min(TILE, n - i * TILE)
            for g in range(group):
                row = h * group + g
                top = _tile_logits(
                    scores,
                    row * n + i * TILE,
                    count,
                    thresholds[row],
                    skipped,
                    h * n + i * TILE,
                    has_skipped,
                    factor,
                    s,
                    0,
                )
                mass = np.float32(0.0)
                for t in range(TILE):
                    mass += exp2_f32(s[t] - top)
                tops[row * tiles + i] = top
                masses[row * tiles + i] = mass


@njit(parallel=True, fastmath=FASTMATH, cache=True, nogil=True, error_model="numpy")
def _choose_tiles(tops, masses, rows, tiles, skip, top, total, floor):
    """Per row: maximum, total mass, and the mass below which tiles may be skipped (at most `skip` of the total)."""
    for row in prange(rows):
        best = NO_MAX
        for i in range(tiles):
            best = fmax(tops[row * tiles + i], best)
        whole = 0.0
        for i in range(tiles):
            x = masses[row * tiles + i] * exp2_f32(tops[row * tiles + i] - best)
            masses[row * tiles + i] = x
            whole += x
        top[row] = best
        total[row] = whole
        budget = skip * whole
        limit = np.float32(budget)
        for _ in range(64):
            below = 0.0
            for i in range(tiles):
                x = masses[row * tiles + i]
                if x <= limit:
                    below += x
            if below <= budget:
                break
            limit *= np.float32(0.7)
        else:
            limit = np.float32(0.0)
        floor[row] = limit


@njit(parallel=True, fastmath=FASTMATH, cache=True, nogil=True, error_model="numpy")
def _live_tiles(masses, floor, heads, group, tiles, live, counts):
    """Tiles that some head of the group needs, ascending."""
    for h in prange(heads):
        found = 0
        for i in range(tiles):
            for g in range(group):
                row = h * group + g
                if masses[row * tiles + i] > floor[row]:
                    live[h * tiles + found] = i
                    found += 1
                    break
        counts[h] = found


@njit(fastmath=FASTMATH, cache=True, nogil=True, error_model="numpy")
def _residual_range(
    scores, h, group, n, d, thresholds, skipped, has_skipped, factor, top, live, first, last, codes, params, slot, bits,
    mass, acc, at,
):  # fmt: skip
    rows = group + 1 if group % 4 == 3 else group
    s = np.zeros(rows * TILE, np.float32)
    values = np.zeros(TILE * d, np.float32)
    base = np.arange(TILE) * d
    for j in range(first, last):
        begin = live[j] * TILE
        count = min(TILE, n - begin)
        for g in range(group):
            row = h * group + g
            _tile_logits(
                scores,
                row * n + begin,
                count,
                thresholds[row],
                skipped,
                h * n + begin,
                has_skipped,
                factor,
                s,
                g * TILE,
            )
            best = top[row]
            weights = s[g * TILE : (g + 1) * TILE]
            sum_ = np.float32(0.0)
            for t in range(TILE):
                w = exp2_f32(weights[t] - best)
                weights[t] = w
                sum_ += w
            mass[at + g] += sum_
        _unpack_tile(values, codes, params, slot + begin, count, d, bits)
        tile_update(acc, at * d, group, d, s, values, base, count, 0, base, False)


@njit(parallel=True, fastmath=FASTMATH, cache=True, nogil=True, error_model="numpy")
def _residual(
    scores, heads, group, n, d, thresholds, skipped, has_skipped, factor, top, live, counts, codes, params, capacity,
    bits, parts, mass, acc,
):  # fmt: skip
    tiles = (n + TILE - 1) // TILE
    rows = group + 1 if group % 4 == 3 else group
    for task in prange(heads * parts):
        h = task // parts
        part = task % parts
        first = h * tiles + counts[h] * part // parts
        last = h * tiles + counts[h] * (part + 1) // parts
        _residual_range(
            scores, h, group, n, d, thresholds, skipped, has_skipped, factor, top, live, first, last, codes, params,
            h * capacity, bits, mass, acc, task * rows,
        )  # fmt: skip


_NO_FLAGS = np.empty(0, np.uint8)


def _check(low: LowBitKV, scores: torch.Tensor, thresholds: torch.Tensor | None, left_out: torch.Tensor | None) -> None:
    heads, n = low.kv_heads, low.num_tokens
    if low.value_bits is None:
        raise ValueError("expected a low-bit copy with values, got one of keys only; build it with value_bits=2 or 4")
    if scores.ndim != 3 or scores.shape[0] != heads or scores.shape[2] != n or scores.dtype != torch.float32:
        raise ValueError(
            f"expected float32 scores of shape [{heads}, group, {n}], got {scores.dtype} {tuple(scores.shape)}"
        )
    if thresholds is not None and tuple(thresholds.shape) != tuple(scores.shape[:2]):
        raise ValueError(f"expected thresholds of shape {tuple(scores.shape[:2])}, got {tuple(thresholds.shape)}")
    if left_out is not None and (tuple(left_out.shape) != (heads, n) or left_out.dtype != torch.uint8):
        raise ValueError(
            f"expected left_out as uint8 of shape [{heads}, {n}], got {left_out.dtype} {tuple(left_out.shape)}"
        )


def lowbit_attention(
    low: LowBitKV,
    scores: torch.Tensor,
    scaling: float,
    thresholds: torch.Tensor | None = None,
    left_out: torch.Tensor | None = None,
    skip: float = 1e-4,
) -> Partial:
    """Attention to the tokens that were not selected, with approximate scores and low-bit values.

    Parameters
    ----------
    low : LowBitKV
        With values.
    scores : Tensor ``[kv_heads, group, num_tokens]`` float32
        Raw scores, usually from :func:`~alaya_hf.kernels.cpu.lowbit_scan.lowbit_scores`.
    scaling : float
        Positive.
    thresholds : Tensor ``[kv_heads, group]`` float32, optional
        Tokens whose score reaches the threshold are left out of that query head; ``+inf`` leaves none out.
    left_out : Tensor ``[kv_heads, num_tokens]`` uint8, optional
        1: left out for every head of the group. Both conditions apply where both are given.
    skip : float
        Values of whole tiles (64 tokens) are not read where that concerns at most this fraction of the mass of every
        head of the group. 0 reads all.

    Returns
    -------
    Partial
        ``out`` ``[kv_heads, group, head_dim]`` and ``lse`` ``[kv_heads, group]``. `lse` counts every token that is not
        left out, skipped or not; `out` is the weighted mean over the tokens read, so that it is off by at most
        ``2 * skip * max|v|``. Empty for a head with no token left.

    Raises
    ------
    ValueError
        A copy without values, or wrong shapes or dtypes.

    Notes
    -----
    Tile skipping after BLASST (arXiv 2512.12087), with an exact bound instead of a fixed threshold: the scores are
    known before any value is read, so the lightest tiles are dropped until `skip` of the row's mass is used up. Cost:
    two reads of the scores and one of the values that matter.
    """
    _check(low, scores, thresholds, left_out)
    heads, group, n = scores.shape
    d = low.head_dim
    out, lse = torch.zeros(heads, group, d), torch.full((heads, group), float("-inf"))
    if not scores.numel():
        return Partial(out, lse)
    tiles = -(-n // TILE)
    flat = scores.contiguous().view(-1).numpy()
    limits = np.full(heads * group, np.inf, np.float32)
    if thresholds is not None:
        limits = thresholds.to(torch.float32).contiguous().view(-1).numpy()
    flags = _NO_FLAGS if left_out is None else left_out.contiguous().view(-1).numpy()
    has_flags = left_out is not None
    factor = np.float32(scaling * LOG2E)
    parts = splits(heads, n)
    tops = np.empty(heads * group * tiles, np.float32)
    masses = np.empty(heads * group * tiles, np.float32)
    _tile_masses(flat, heads, group, n, limits, flags, has_flags, factor, parts, tops, masses)
    top, floor = (np.empty(heads * group, np.float32) for _ in range(2))
    total = np.empty(heads * group, np.float64)
    _choose_tiles(tops, masses, heads * group, tiles, float(skip), top, total, floor)
    live = np.empty(heads * tiles, np.int64)
    counts = np.empty(heads, np.int64)
    _live_tiles(masses, floor, heads, group, tiles, live, counts)
    rows = padded_group(group)
    mass = np.zeros(heads * parts * rows, np.float32)
    acc = np.zeros(heads * parts * rows * d, np.float32)
    _residual(
        flat, heads, group, n, d, limits, flags, has_flags, factor, top, live, counts, low.value_codes.view(-1).numpy(),
        as_numpy(low.value_params.view(-1)), low.value_codes.shape[1], low.value_bits, parts, mass, acc,
    )  # fmt: skip
    read = torch.from_numpy(mass).view(heads, parts, rows)[:, :, :group].sum(1)
    summed = torch.from_numpy(acc).view(heads, parts, rows, d)[:, :, :group].sum(1)
    some = torch.from_numpy(total).view(heads, group) > 0
    out = torch.where(some.unsqueeze(-1), summed / read.unsqueeze(-1).clamp_min(1e-30), out)
    full = torch.from_numpy(total).log() + LN2 * torch.from_numpy(top).double()
    return Partial(out, torch.where(some, full.view(heads, group).float(), lse))


def lowbit_attention_reference(
    low: LowBitKV,
    scores: torch.Tensor,
    scaling: float,
    thresholds: torch.Tensor | None = None,
    left_out: torch.Tensor | None = None,
    skip: float = 0.0,
) -> Partial:
    """:func:`lowbit_attention` in plain torch, in the precision of `scores`; `skip` is ignored (nothing is skipped)."""
    _, values = low.dequantize()
    if values is None:
        raise ValueError("expected a low-bit copy with values, got one of keys only; build it with value_bits=2 or 4")
    logits = scores * scaling
    if thresholds is not None:
        logits = logits.masked_fill(scores >= thresholds.unsqueeze(-1), float("-inf"))
    if left_out is not None:
        logits = logits.masked_fill(left_out.bool().unsqueeze(1), float("-inf"))
    if not low.num_tokens:
        return Partial(scores.new_zeros(*scores.shape[:2], low.head_dim), scores.new_full(scores.shape[:2], -torch.inf))
    out = torch.softmax(logits, dim=-1).nan_to_num(0.0) @ values.to(scores.dtype)
    return Partial(out, torch.logsumexp(logits, dim=-1))
