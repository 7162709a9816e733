"""The window's part of a decode step: append the new token, attend to what the window holds."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from alaya_hf.kernels.gpu.eight_bit import quantise
from alaya_hf.kernels.gpu.layout import TILE
from alaya_hf.kernels.gpu.op import LOG2E, check, next_power_of_2, operator
from alaya_hf.kernels.gpu.prefix import Prefix, locate
from alaya_hf.kernels.gpu.store_format import StoreFormat
from alaya_hf.kernels.gpu.store_table import line_of, table_format

BLOCK = 64  # window slots of one program


def splits(slots: int) -> int:
    """Partials that a window of so many slots gives."""
    return max(1, -(-slots // BLOCK))


@triton.jit
def _window(  # type: ignore[no-untyped-def]
    q_ptr, k_new, v_new, win_k, win_v, store, scales, total, low, best, acc, ml, bounds, blocks,
    slots, ring, init, store_capacity, block_count, partials, slot0, factor,
    H: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP2: tl.constexpr, BLOCK: tl.constexpr,
    STORE: tl.constexpr, FORMAT: tl.constexpr, ROW: tl.constexpr, SCALES: tl.constexpr, PREFIX: tl.constexpr,
    TABLE: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    b = bh // H
    count = tl.load(total + b) + 1  # with the new token
    begin = tl.load(low + b)
    newest = count - 1 - init  # place of the new token after the first `init` ones
    new_slot = tl.where(newest < 0, count - 1, init + (newest + ring) % ring)
    slot = split * BLOCK + tl.arange(0, BLOCK)
    # The youngest token that a ring slot can hold; it is there if it is neither quantised nor yet to come.
    age = ((newest - (slot - init)) % ring + ring) % ring
    place = newest - age
    valid = tl.where(slot < init, slot < count, (place >= begin) & (place >= 0)) & (slot < slots) & (slot != new_slot)
    g = tl.arange(0, GP)
    c = tl.arange(0, DP2)
    q = tl.load(q_ptr + (bh * G + g)[:, None] * D + c[None, :], mask=(g < G)[:, None] & (c < D)[None, :], other=0.0)
    at = (bh * slots + slot)[:, None] * D + c[None, :]
    inside = valid[:, None] & (c < D)[None, :]
    k = tl.load(win_k + at, mask=inside, other=0.0)
    v = tl.load(win_v + at, mask=inside, other=0.0)
    # tf32 holds bfloat16 and float16 exactly.
    q = q.to(tl.float32)
    v = v.to(tl.float32)
    s = tl.dot(q, tl.trans(k.to(tl.float32)), input_precision="tf32")
    s = tl.where(valid[None, :], s, float("-inf"))
    top = tl.max(s, 1)
    kn = tl.load(k_new + bh * D + c, mask=c < D, other=0.0)
    vn = tl.load(v_new + bh * D + c, mask=c < D, other=0.0)
    s_new = tl.sum(q * kn.to(tl.float32)[None, :], 1)
    if split != 0:
        s_new = tl.full([GP], float("-inf"), tl.float32)
    top = tl.maximum(top, s_new)
    tl.atomic_max(best + bh * G + g, top, mask=(g < G) & (top > float("-inf")))
    some = tl.where(top > float("-inf"), top, 0.0)
    p = tl.exp2((s - some[:, None]) * factor)
    p_new = tl.exp2((s_new - some) * factor)
    weight = tl.sum(p, 1) + p_new
    out = tl.dot(p, v, input_precision="tf32") + p_new[:, None] * vn.to(tl.float32)[None, :]
    row = (bh * G + g) * partials + slot0 + split
    tl.store(acc + row[:, None] * D + c[None, :], out, mask=(g < G)[:, None] & (c < D)[None, :])
    tl.store(ml + row * 2, top * factor, mask=g < G)
    tl.store(ml + row * 2 + 1, weight, mask=g < G)
    if split == 0:  # nobody reads the new token's slot in this launch
        tl.store(win_k + (bh * slots + new_slot) * D + c, kn, mask=c < D)
        tl.store(win_v + (bh * slots + new_slot) * D + c, vn, mask=c < D)
        if STORE:
            line = newest
            room = newest >= 0
            if PREFIX:
                line, in_prefix, there = locate(bounds, b, newest)
                room = room & (in_prefix == 0)
            if TABLE:
                row_at, room = line_of(blocks, b, line, room, block_count, H, bh % H, ROW, PAGE)
            else:
                room = room & (line < store_capacity)
                row_at = (bh * store_capacity + line) * ROW
            fits = (c < D) & room
            if FORMAT > 0:
                k_codes, k_scale = quantise(kn.to(tl.float32), FORMAT)
                v_codes, v_scale = quantise(vn.to(tl.float32), FORMAT)
                tl.store(scales + row_at // 4 + SCALES, k_scale, mask=room)
                tl.store(scales + row_at // 4 + SCALES + 1, v_scale, mask=room)
            else:
                k_codes = kn
                v_codes = vn
            tl.store(store + row_at + c, k_codes, mask=fits)
            tl.store(store + row_at + D + c, v_codes, mask=fits)


@operator("window_attention", mutates=["window_k", "window_v", "store", "best", "acc", "ml"])
def window_attention(
    q: Tensor, k: Tensor, v: Tensor, window_k: Tensor, window_v: Tensor, store: Tensor | None, total: Tensor, low: Tensor,
    best: Tensor, acc: Tensor, ml: Tensor, slot0: int, init: int, scaling: float, bounds: Tensor | None = None,
    blocks: Tensor | None = None, block_tokens: int = 0,
) -> None:  # fmt: skip
    """Append a token to the window and to the store, and attend to the window with it.

    Parameters
    ----------
    q : Tensor ``[batch, heads, head_dim]``
    k, v : Tensor ``[batch, kv_heads, head_dim]``
        Of the new token.
    window_k, window_v : Tensor ``[batch, kv_heads, init + ring, head_dim]``
        The first `init` tokens, then a ring: token `p` lies in slot ``init + (p - init) % ring``. The rotary embedding is
        in the keys, so order does not matter.
    store : Tensor ``[batch, kv_heads, capacity, *tail]``, optional
        Rows of a :class:`~alaya_hf.kernels.gpu.store_format.StoreFormat`, which its dtype tells; an 8-bit one is quantised
        to. Host memory that the device can write (see :func:`~alaya_hf.kernels.gpu.host_memory.device_view`); token `p` goes to
        place ``p - init``. Tokens beyond its capacity and the first `init` are not written.
    total : Tensor ``[batch]`` int32
        Tokens before this one, padding excluded.
    low : Tensor ``[batch]`` int32
        Tokens (after the first `init`) that the low-bit copy holds; the window serves the others.
    best : Tensor ``[batch, kv_heads, group]`` float32
        Raised to the best raw score seen.
    acc, ml : Tensor ``[batch, kv_heads, group, partials, head_dim]`` and ``[..., 2]`` float32
        Partials ``slot0 ... slot0 + splits(slots)`` are written: weighted sums of values, and the base-2 exponent they
        are relative to with the sum of weights.
    bounds : Tensor ``[batch, 3]`` int64, optional
        Of a :class:`~alaya_hf.kernels.gpu.prefix.Prefix`: the store has the other places alone.
    blocks, block_tokens : Tensor ``[batch, n]`` int64, int
        With them `store` is the rows of a :class:`~alaya_hf.kernels.gpu.store_table.StoreTable`.
    """
    batch, heads, slots, d = window_k.shape
    group = q.shape[1] // heads
    check(q, "q", (batch, heads * group, d))
    check(k, "k", (batch, heads, d))
    check(v, "v", (batch, heads, d))
    check(window_k, "window_k", (batch, heads, slots, d))
    check(window_v, "window_v", (batch, heads, slots, d))
    if store is None:
        form = StoreFormat(d, window_k.dtype)
    elif blocks is None:
        form = StoreFormat.of(store, d)
    else:
        form = table_format(store, blocks, block_tokens, batch, d)
    elements, scales = form.kernel_views(window_k if store is None else store)
    check(acc, "acc", (batch, heads, group, None, d), torch.float32)
    _window[(splits(slots), batch * heads)](
        q, k, v, window_k, window_v, elements, scales, total, low, best, acc, ml, total if bounds is None else bounds,
        total if blocks is None else blocks, slots, slots - init, init,
        0 if store is None or blocks is not None else store.shape[2], 0 if blocks is None else blocks.shape[1], acc.shape[3],
        slot0, scaling * LOG2E, H=heads, G=group, GP=max(16, next_power_of_2(group)), D=d, DP2=next_power_of_2(d), BLOCK=BLOCK,
        STORE=store is not None, FORMAT=form.code, ROW=form.row, SCALES=form.scale_place,
        PREFIX=bounds is not None, TABLE=blocks is not None, PAGE=block_tokens, num_warps=4,
    )  # fmt: skip


def window_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, window_k: Tensor, window_v: Tensor, store: Tensor | None, total: Tensor, low: Tensor,
    best: Tensor, acc: Tensor, ml: Tensor, slot0: int, init: int, scaling: float, bounds: Tensor | None = None,
    blocks: Tensor | None = None, block_tokens: int = 0,
) -> None:  # fmt: skip
    """:func:`window_attention` in plain torch: one partial, the others empty."""
    batch, heads, slots, d = window_k.shape
    ring, count = slots - init, splits(slots)
    ml[..., slot0 : slot0 + count, 0], ml[..., slot0 : slot0 + count, 1] = float("-inf"), 0.0
    for row in range(batch):
        p, begin = int(total[row]), int(low[row])
        slot = p if p < init else init + (p - init) % ring
        window_k[row, :, slot], window_v[row, :, slot] = k[row], v[row]
        line, mine = p - init, True
        if bounds is not None:
            lines, own = Prefix(window_k, bounds).own_lines(row, torch.tensor(p - init))
            line, mine = int(lines), bool(own)
        if store is not None and blocks is not None and p >= init:
            form = table_format(store, blocks, block_tokens, batch, d)
            which, within = divmod(line, block_tokens) if block_tokens else (0, line)
            if which < blocks.shape[1] and int(blocks[row, which]) >= 0:
                at = store.storage_offset() + int(blocks[row, which]) + within * heads * form.row
                target = torch.as_strided(store, (heads, form.row), (form.row, 1), at)
                target.copy_(form.pack(k[row], v[row]).flatten(1))
        elif store is not None and blocks is None and mine and p >= init and line < store.shape[2]:
            rows = StoreFormat.of(store, d).pack(k[row], v[row])
            store[row, :, line] = rows.to(store.device)
        held = list(range(min(init, p + 1))) + [init + x % ring for x in range(begin, p + 1 - init)]
        keys, values = window_k[row][:, held].float(), window_v[row][:, held].float()
        s = q[row].view(heads, -1, d).float() @ keys.transpose(1, 2)
        top = s.amax(-1)
        best[row] = torch.maximum(best[row], top)
        weights = torch.exp2((s - top.unsqueeze(-1)) * (scaling * LOG2E))
        acc[row, :, :, slot0] = weights @ values
        ml[row, :, :, slot0, 0], ml[row, :, :, slot0, 1] = top * (scaling * LOG2E), weights.sum(-1)


def advance(total: Tensor, low: Tensor, init: int, local: int, capacity: int, tokens: int = 1) -> None:
    """Count the new tokens of a pass, and those that left full windows for the low-bit copy. Once a pass, in place.

    Parameters
    ----------
    total, low : Tensor ``[batch]`` int32
    capacity : int
        Tokens that the low-bit copy has room for.
    tokens : int
        New tokens. One: at most one tile leaves.
    """
    total.add_(tokens)
    tiles = (total - init - low - local).clamp_(0, TILE * (-(-tokens // TILE))) // TILE
    low.add_(TILE * torch.minimum(tiles, (capacity - low) // TILE))
