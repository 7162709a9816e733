"""Take the new tokens of a short pass in: what leaves the window goes to the low-bit copy, the others take their slots."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from alaya_hf.kernels.gpu.eight_bit import quantise
from alaya_hf.kernels.gpu.layout import TILE
from alaya_hf.kernels.gpu.op import check, next_power_of_2, operator
from alaya_hf.kernels.gpu.prefix import locate
from alaya_hf.kernels.gpu.quantise import quantise_tokens
from alaya_hf.kernels.gpu.store_format import StoreFormat
from alaya_hf.kernels.gpu.store_table import line_of, table_format


def leaving_tiles(new: int) -> int:
    """Most tiles that leave a window when so many tokens come in, given that it was not full before."""
    return (new + TILE - 1) // TILE


@triton.jit
def _leaving(count, low, init, local, new, capacity):  # type: ignore[no-untyped-def]
    """Tokens of a row that leave the window: whole tiles, as many as leave it `local` ... ``local + 63``."""
    tiles = tl.maximum(count + new - init - low - local, 0) // 64
    return 64 * tl.minimum(tiles, (capacity - low) // 64)


@triton.jit
def _collect(  # type: ignore[no-untyped-def]
    k_new, v_new, win_k, win_v, total, low, left_k, left_v, first_tile, counts, slots, ring, init, local, new, capacity, room,
    H: tl.constexpr, D: tl.constexpr, DP2: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    bh = tl.program_id(1).to(tl.int64)
    b = bh // H
    count = tl.load(total + b)
    begin = tl.load(low + b)
    leaving = _leaving(count, begin, init, local, new, capacity)
    if (tl.program_id(0) == 0) & (bh % H == 0):
        tl.store(first_tile + b, begin // 64)
        tl.store(counts + b, leaving)
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    place = begin + t
    arrived = place + init - count  # 0 or more: a new token
    there = t < leaving
    c = tl.arange(0, DP2)
    inside = c < D
    old = (there & (arrived < 0))[:, None] & inside[None, :]
    young = (there & (arrived >= 0))[:, None] & inside[None, :]
    held = (bh * slots + init + place % ring)[:, None] * D + c[None, :]
    fresh = (bh * new + arrived)[:, None] * D + c[None, :]
    k = tl.where(old, tl.load(win_k + held, mask=old, other=0.0), tl.load(k_new + fresh, mask=young, other=0.0))
    v = tl.where(old, tl.load(win_v + held, mask=old, other=0.0), tl.load(v_new + fresh, mask=young, other=0.0))
    to = (bh * room + t)[:, None] * D + c[None, :]
    tl.store(left_k + to, k, mask=there[:, None] & inside[None, :])
    tl.store(left_v + to, v, mask=there[:, None] & inside[None, :])


@triton.jit
def _write(  # type: ignore[no-untyped-def]
    k_new, v_new, win_k, win_v, store, scales, total, low, bounds, blocks, slots, ring, init, local, new, capacity,
    store_capacity, block_count,
    H: tl.constexpr, D: tl.constexpr, DP2: tl.constexpr, FORMAT: tl.constexpr, ROW: tl.constexpr, SCALES: tl.constexpr,
    PREFIX: tl.constexpr, TABLE: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    count = tl.load(total + bh // H)
    begin = tl.load(low + bh // H)
    begin += _leaving(count, begin, init, local, new, capacity)
    place = count + token - init
    c = tl.arange(0, DP2)
    k = tl.load(k_new + (bh * new + token) * D + c, mask=c < D, other=0.0)
    v = tl.load(v_new + (bh * new + token) * D + c, mask=c < D, other=0.0)
    slot = tl.where(place < 0, count + token, init + (place + ring) % ring)
    # A token that left at once must not take the slot of one that stays.
    stays = (c < D) & ((place < 0) | (place >= begin))
    tl.store(win_k + (bh * slots + slot) * D + c, k, mask=stays)
    tl.store(win_v + (bh * slots + slot) * D + c, v, mask=stays)
    line = place
    fits = place >= 0
    if PREFIX:
        line, in_prefix, there = locate(bounds, bh // H, place)
        fits = fits & (in_prefix == 0)
    if TABLE:
        row_at, fits = line_of(blocks, bh // H, line, fits, block_count, H, bh % H, ROW, PAGE)
    else:
        fits = fits & (line < store_capacity)
        row_at = (bh * store_capacity + line) * ROW
    if FORMAT > 0:
        k_codes, k_scale = quantise(k.to(tl.float32), FORMAT)
        v_codes, v_scale = quantise(v.to(tl.float32), FORMAT)
        tl.store(scales + row_at // 4 + SCALES, k_scale, mask=fits)
        tl.store(scales + row_at // 4 + SCALES + 1, v_scale, mask=fits)
    else:
        k_codes = k
        v_codes = v
    tl.store(store + row_at + c, k_codes, mask=fits & (c < D))
    tl.store(store + row_at + D + c, v_codes, mask=fits & (c < D))


@operator("collect_leaving", mutates=["left_k", "left_v", "first_tile", "counts"])
def collect_leaving(
    k: Tensor, v: Tensor, window_k: Tensor, window_v: Tensor, total: Tensor, low: Tensor, left_k: Tensor, left_v: Tensor,
    first_tile: Tensor, counts: Tensor, init: int, local: int, capacity: int,
) -> None:  # fmt: skip
    """Put the tokens that leave the window side by side, for :func:`~alaya_hf.kernels.gpu.quantise.quantise_tokens`.

    Parameters
    ----------
    k, v : Tensor ``[batch, kv_heads, new, head_dim]``
    window_k, window_v, total, low : see :func:`append_tokens`
    left_k, left_v : Tensor ``[batch, kv_heads, 64 * leaving_tiles(new), head_dim]``
    first_tile, counts : Tensor ``[batch]`` int32
        Receive the tile where they go, and how many they are.
    capacity : int
        Tokens that the low-bit copy has room for.
    """
    batch, heads, slots, d = window_k.shape
    new, room = k.shape[2], TILE * leaving_tiles(k.shape[2])
    check(k, "k", (batch, heads, new, d))
    check(v, "v", (batch, heads, new, d))
    check(left_k, "left_k", (batch, heads, room, d), k.dtype)
    check(left_v, "left_v", (batch, heads, room, d), k.dtype)
    _collect[(room // TILE, batch * heads)](
        k, v, window_k, window_v, total, low, left_k, left_v, first_tile, counts, slots, slots - init, init, local, new, capacity,
        room, H=heads, D=d, DP2=next_power_of_2(d), BLOCK=TILE, num_warps=4,
    )  # fmt: skip


@operator("write_tokens", mutates=["window_k", "window_v", "store"])
def write_tokens(
    k: Tensor, v: Tensor, window_k: Tensor, window_v: Tensor, store: Tensor, total: Tensor, low: Tensor, init: int, local: int,
    capacity: int, bounds: Tensor | None = None, blocks: Tensor | None = None, block_tokens: int = 0,
) -> None:  # fmt: skip
    """Write new tokens to the store, and to the window those that stay in it. Parameters as in :func:`append_tokens`."""
    batch, heads, slots, d = window_k.shape
    new = k.shape[2]
    form = StoreFormat.of(store, d) if blocks is None else table_format(store, blocks, block_tokens, batch, d)
    check(k, "k", (batch, heads, new, d))
    check(v, "v", (batch, heads, new, d))
    elements, scales = form.kernel_views(store)
    _write[(new, batch * heads)](
        k, v, window_k, window_v, elements, scales, total, low, total if bounds is None else bounds,
        total if blocks is None else blocks, slots, slots - init, init, local, new, capacity,
        store.shape[2] if blocks is None else 0, 0 if blocks is None else blocks.shape[1], H=heads, D=d, DP2=next_power_of_2(d),
        FORMAT=form.code, ROW=form.row, SCALES=form.scale_place, PREFIX=bounds is not None, TABLE=blocks is not None,
        PAGE=block_tokens, num_warps=1,
    )  # fmt: skip


def append_tokens(
    k: Tensor, v: Tensor, window_k: Tensor, window_v: Tensor, store: Tensor, records: Tensor, total: Tensor, low: Tensor,
    left_k: Tensor, left_v: Tensor, first_tile: Tensor, counts: Tensor, init: int, local: int, key_bits: int, value_bits: int,
    bounds: Tensor | None = None, blocks: Tensor | None = None, block_tokens: int = 0,
) -> None:  # fmt: skip
    """Take consecutive new tokens in, all rows alike, as one-token steps would one after the other.

    Parameters
    ----------
    k, v : Tensor ``[batch, kv_heads, new, head_dim]``
    window_k, window_v : Tensor ``[batch, kv_heads, init + local + 64, head_dim]``
    store : Tensor ``[batch, kv_heads, capacity, *tail]``
    records : Tensor ``[batch, kv_heads, tiles, record / 4]`` int32
    total, low : Tensor ``[batch]`` int32
        As before the pass; :func:`~alaya_hf.kernels.gpu.window.advance` counts afterwards.
    left_k, left_v, first_tile, counts
        Working memory of :func:`collect_leaving`.
    local : int
        Recent tokens that the window keeps at least.
    bounds : Tensor ``[batch, 3]`` int64, optional
        Of a :class:`~alaya_hf.kernels.gpu.prefix.Prefix`: the store has the other places alone.
    blocks, block_tokens : Tensor ``[batch, n]`` int64, int
        With them `store` is the rows of a :class:`~alaya_hf.kernels.gpu.store_table.StoreTable`.

    Notes
    -----
    Three launches; reads no number on the host.
    """
    capacity = TILE * records.shape[2]
    collect_leaving(
        k, v, window_k, window_v, total, low, left_k, left_v, first_tile, counts, init, local, capacity
    )  # fmt: skip
    quantise_tokens(left_k, left_v, records, first_tile, counts, key_bits, value_bits)
    write_tokens(k, v, window_k, window_v, store, total, low, init, local, capacity, bounds, blocks, block_tokens)


__all__ = ["append_tokens", "collect_leaving", "leaving_tiles", "write_tokens"]
