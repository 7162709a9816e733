"""Quantise tokens into the low-bit copy: a chunk of the prefill, or what leaves the window during decoding."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from alaya_hf.kernels.gpu.layout import MEAN_BLOCK, TILE, VALUE_GROUP, Layout
from alaya_hf.kernels.gpu.op import check, next_power_of_2, operator
from alaya_hf.kernels.gpu.unpack import constants


@triton.jit
def _quantise(  # type: ignore[no-untyped-def]
    k_ptr, v_ptr, words, halves, first_tile, counts, total, low,
    k_b, k_h, k_t, v_b, v_h, v_t, capacity, init, local, ring,
    H: tl.constexpr, D: tl.constexpr, DP2: tl.constexpr, RING: tl.constexpr, KW2: tl.constexpr, VW2: tl.constexpr,
    PADDED: tl.constexpr, KEY_BITS: tl.constexpr, VALUE_BITS: tl.constexpr, KEY_WORDS: tl.constexpr,
    VALUE_WORDS: tl.constexpr, KEY_PARAMS: tl.constexpr, VALUES: tl.constexpr, VALUE_PARAMS: tl.constexpr,
    RECORD: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0)
    bh = tl.program_id(1)
    b = bh // H
    h = bh % H
    if RING:  # the 64 oldest recent tokens of the window, if it is full
        begin = tl.load(low + b)
        tile = begin // 64
        count = tl.where(tl.load(total + b) + 1 - init - begin >= local + 64, 64, 0)
    else:
        begin = i * 64
        tile = tl.load(first_tile + b) + i
        count = tl.minimum(tl.load(counts + b) - begin, 64)
    if (count > 0) & (tile < capacity):
        at = (bh.to(tl.int64) * capacity + tile) * RECORD
        keys = k_ptr + b.to(tl.int64) * k_b + h.to(tl.int64) * k_h
        values = v_ptr + b.to(tl.int64) * v_b + h.to(tl.int64) * v_h
        t = tl.arange(0, 64)
        place = begin + t
        if RING:
            place = init + place % ring
        t_at = place.to(tl.int64)[:, None]
        c = tl.arange(0, DP2)
        real = (t < count)[:, None] & (c < D)[None, :]
        # Steps and zeros of the keys, one of each per channel.
        k = tl.load(keys + t_at * k_t + c[None, :], mask=real, other=0.0).to(tl.float32)
        k = tl.minimum(tl.maximum(k, -65000.0), 65000.0)
        zero = tl.where(c < D, tl.min(tl.where(real, k, 65000.0), 0), 0.0).to(tl.float16)
        high = tl.where(c < D, tl.max(tl.where(real, k, -65000.0), 0), 0.0)
        FIELDS: tl.constexpr = 8 // KEY_BITS
        j = c // 8
        power = (1 << (KEY_BITS * (j % FIELDS))).to(tl.float32)
        step = ((high - zero.to(tl.float32)) / ((1 << KEY_BITS) - 1) / power).to(tl.float16)
        half = (at + KEY_PARAMS) // 2 + ((j // 4 * 4 + c % 8 // 2) * 4 + j % 4) * 2 + c % 2
        tl.store(halves + half, step, mask=c < PADDED)
        tl.store(halves + half + PADDED, zero, mask=c < PADDED)
        if VALUE_BITS == 0:
            for block in tl.static_range(2):
                t32 = block * 32 + tl.arange(0, 32)
                p32 = begin + t32
                if RING:
                    p32 = init + p32 % ring
                some = (t32 < count)[:, None] & (c < D)[None, :]
                v = tl.load(values + p32.to(tl.int64)[:, None] * v_t + c[None, :], mask=some, other=0.0).to(tl.float32)
                here = tl.maximum(tl.minimum(count - block * 32, 32), 1).to(tl.float32)
                tl.store(
                    halves + (at + VALUES) // 2 + c * 2 + block, (tl.sum(v, 0) / here).to(tl.float16), mask=c < PADDED
                )
        else:
            GROUPS: tl.constexpr = PADDED // 32
            half_t = (at + VALUE_PARAMS) // 2 + (t // 16 * 4 + t % 8 // 2) * GROUPS * 4 + t % 16 // 8 * 2 + t % 2
            for g in tl.static_range(GROUPS):
                cg = g * 32 + tl.arange(0, 32)
                some = (t < count)[:, None] & (cg < D)[None, :]
                v = tl.load(values + t_at * v_t + cg[None, :], mask=some, other=0.0).to(tl.float32)
                v = tl.minimum(tl.maximum(v, -65000.0), 65000.0)
                v_zero = tl.where(t < count, tl.min(tl.where(some, v, 65000.0), 1), 0.0).to(tl.float16)
                v_high = tl.where(t < count, tl.max(tl.where(some, v, -65000.0), 1), 0.0)
                v_step = ((v_high - v_zero.to(tl.float32)) / ((1 << VALUE_BITS) - 1)).to(tl.float16)
                tl.store(halves + half_t + g * 4, v_step)
                tl.store(halves + half_t + g * 4 + 64 * GROUPS, v_zero)
        tl.debug_barrier()  # the words below read steps and zeros that other threads wrote
        # Words: each gathers the 16 / bits * 2 codes it holds.
        o = tl.arange(0, KW2)
        lane = o // KEY_WORDS % 32
        token = o // KEY_WORDS // 32 * 8 + lane // 4
        place = begin + token
        if RING:
            place = init + place % ring
        row = keys + place.to(tl.int64) * k_t
        word = tl.zeros([KW2], tl.int32)
        for byte in tl.static_range(2):
            for field in tl.static_range(FIELDS):
                jj = (o % KEY_WORDS * 2 + byte) * FIELDS + field
                for e in tl.static_range(2):
                    ch = 8 * jj + 2 * (lane % 4) + e
                    ok = (ch < D) & (token < count) & (o < 256 * KEY_WORDS)
                    x = tl.load(row + ch, mask=ok, other=0.0).to(tl.float32)
                    p = (at + KEY_PARAMS) // 2 + ((jj // 4 * 4 + lane % 4) * 4 + jj % 4) * 2 + e
                    s = tl.load(halves + p, mask=ok, other=0.0).to(tl.float32) * (1 << (KEY_BITS * field))
                    z = tl.load(halves + p + PADDED, mask=ok, other=0.0).to(tl.float32)
                    code = tl.minimum(tl.maximum((x - z) / tl.maximum(s, 1e-30) + 0.5, 0.0), (1 << KEY_BITS) - 1.0)
                    code = tl.where(ok & (s > 0), code, 0.0).to(tl.int32)
                    word |= code << (16 * e + 8 * byte + KEY_BITS * field)
        tl.store(words + at // 4 + o, word, mask=o < 256 * KEY_WORDS)
        if VALUE_BITS > 0:
            V_FIELDS: tl.constexpr = 8 // VALUE_BITS
            V_GROUPS: tl.constexpr = PADDED // 32
            o = tl.arange(0, VW2)
            lane = o // VALUE_WORDS % 32
            ks = o // VALUE_WORDS // 32
            word = tl.zeros([VW2], tl.int32)
            for byte in tl.static_range(2):
                for e in tl.static_range(2):
                    token = ks * 16 + byte * 8 + 2 * (lane % 4) + e
                    place = begin + token
                    if RING:
                        place = init + place % ring
                    row = values + place.to(tl.int64) * v_t
                    for field in tl.static_range(V_FIELDS):
                        ch = (o % VALUE_WORDS * V_FIELDS + field) * 8 + lane // 4
                        ok = (ch < D) & (token < count) & (o < 128 * VALUE_WORDS)
                        x = tl.load(row + ch, mask=ok, other=0.0).to(tl.float32)
                        p = (at + VALUE_PARAMS) // 2 + (((ks * 4 + lane % 4) * V_GROUPS + ch // 32) * 2 + byte) * 2 + e
                        s = tl.load(halves + p, mask=ok, other=0.0).to(tl.float32)
                        z = tl.load(halves + p + 64 * V_GROUPS, mask=ok, other=0.0).to(tl.float32)
                        code = tl.minimum(
                            tl.maximum((x - z) / tl.maximum(s, 1e-30) + 0.5, 0.0), (1 << VALUE_BITS) - 1.0
                        )
                        code = tl.where(ok & (s > 0), code, 0.0).to(tl.int32)
                        word |= code << (16 * e + 8 * byte + VALUE_BITS * field)
            tl.store(words + (at + VALUES) // 4 + o, word, mask=o < 128 * VALUE_WORDS)


def _launch(layout: Layout, grid: int, keys: Tensor, values: Tensor, records: Tensor, numbers: tuple[Tensor, ...], init: int,
            local: int, ring: int, is_ring: bool) -> None:  # fmt: skip
    batch, heads, _, d = keys.shape
    if keys.stride(3) != 1 or values.stride(3) != 1:
        raise ValueError("expected keys and values whose channels lie side by side")
    check(records, "records", (batch, heads, None, layout.record // 4), torch.int32)
    _quantise[(grid, batch * heads)](
        keys, values, records, records.view(torch.float16), *numbers,
        *keys.stride()[:3], *values.stride()[:3], records.shape[2], init, local, ring,
        H=heads, D=d, DP2=next_power_of_2(layout.padded), RING=is_ring, KW2=next_power_of_2(256 * layout.key_words),
        VW2=next_power_of_2(128 * max(1, layout.value_words)), **constants(layout), num_warps=8,
    )  # fmt: skip


@operator("quantise_tokens", mutates=["records"])
def quantise_tokens(
    keys: Tensor, values: Tensor, records: Tensor, first_tile: Tensor, counts: Tensor, key_bits: int, value_bits: int
) -> None:
    """Quantise a chunk of tokens.

    Parameters
    ----------
    keys, values : Tensor ``[batch, kv_heads, tokens, head_dim]``
        Any strides with channels side by side; device memory, or pinned host memory.
    records : Tensor ``[batch, kv_heads, tiles, record / 4]`` int32
        Written from ``first_tile[row]`` on; whole tiles of 64 tokens, the last one perhaps short. To grow a short tile,
        pass its tokens again from its start.
    first_tile, counts : Tensor ``[batch]`` int32
        Tile that the chunk's first token starts, and tokens of each row.
    """
    if keys.shape[2]:
        layout = Layout(keys.shape[3], key_bits, value_bits)
        numbers = (first_tile, counts, first_tile, counts)
        _launch(layout, -(-keys.shape[2] // TILE), keys, values, records, numbers, 0, 0, 1, False)


def quantise_tokens_reference(
    keys: Tensor, values: Tensor, records: Tensor, first_tile: Tensor, counts: Tensor, key_bits: int, value_bits: int
) -> None:
    """:func:`quantise_tokens` in plain torch."""
    layout = Layout(keys.shape[3], key_bits, value_bits)
    for row, (tile, count) in enumerate(zip(first_tile.tolist(), counts.tolist(), strict=True)):
        packed = layout.pack(keys[row : row + 1, :, :count], values[row : row + 1, :, :count])
        records[row, :, tile : tile + packed.shape[2]] = packed[0]


@operator("extend_lowbit", mutates=["records"])
def extend_lowbit(
    window_k: Tensor, window_v: Tensor, records: Tensor, total: Tensor, low: Tensor, init: int, local: int,
    key_bits: int, value_bits: int,
) -> None:  # fmt: skip
    """Quantise the window's 64 oldest recent tokens in rows where it holds ``local + 64`` of them; else do nothing.

    Parameters
    ----------
    window_k, window_v : Tensor ``[batch, kv_heads, init + ring, head_dim]``
        See :func:`~alaya_hf.kernels.gpu.window.window_attention`; called after it in the same step.
    records : Tensor ``[batch, kv_heads, tiles, record / 4]`` int32
    total, low : Tensor ``[batch]`` int32
        As in this step's `window_attention`; :func:`~alaya_hf.kernels.gpu.window.advance` counts the move afterwards.
    """
    layout = Layout(window_k.shape[3], key_bits, value_bits)
    ring = window_k.shape[2] - init
    if ring < local + TILE:
        raise ValueError(f"expected room for local + {TILE} = {local + TILE} recent tokens in the window, got {ring}")
    _launch(layout, 1, window_k, window_v, records, (low, low, total, low), init, local, ring, True)


def extend_lowbit_reference(
    window_k: Tensor, window_v: Tensor, records: Tensor, total: Tensor, low: Tensor, init: int, local: int,
    key_bits: int, value_bits: int,
) -> None:  # fmt: skip
    """:func:`extend_lowbit` in plain torch."""
    layout = Layout(window_k.shape[3], key_bits, value_bits)
    ring = window_k.shape[2] - init
    for row, (count, begin) in enumerate(zip(total.tolist(), low.tolist(), strict=True)):
        if count + 1 - init - begin >= local + TILE and begin // TILE < records.shape[2]:
            slots = init + (begin + torch.arange(TILE, device=low.device)) % ring
            records[row, :, begin // TILE] = layout.pack(
                window_k[row : row + 1, :, slots], window_v[row : row + 1, :, slots]
            )[0, :, 0]


__all__ = ["MEAN_BLOCK", "TILE", "VALUE_GROUP", "extend_lowbit", "extend_lowbit_reference", "quantise_tokens",
           "quantise_tokens_reference"]  # fmt: skip
