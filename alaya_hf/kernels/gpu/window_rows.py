"""The window's part of a short pass: every new token attends to what the window holds and to the new tokens up to itself."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from alaya_hf.kernels.gpu import window
from alaya_hf.kernels.gpu.op import LOG2E, check, next_power_of_2, operator

_ROWS = 32  # most query rows of one program


def splits(slots: int, new: int) -> int:
    """Partials that a window of so many slots and so many new tokens give."""
    return window.splits(slots) + -(-new // window.BLOCK)


@triton.jit
def _window_rows(  # type: ignore[no-untyped-def]
    q_ptr, k_new, v_new, win_k, win_v, total, low, best, acc, ml,
    slots, ring, init, rows, new, first, partials, slot0, factor,
    H: tl.constexpr, G: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, DP2: tl.constexpr, BLOCK: tl.constexpr,
    HELD: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    r = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    x = tl.arange(0, BLOCK)
    c = tl.arange(0, DP2)
    if split < HELD:
        count = tl.load(total + bh // H)
        begin = tl.load(low + bh // H)
        slot = split * BLOCK + x
        newest = count - 1 - init  # place of the youngest token held
        # The youngest token that a ring slot can hold; it is there if it is neither quantised nor yet to come.
        age = ((newest - (slot - init)) % ring + ring) % ring
        place = newest - age
        there = tl.where(slot < init, slot < count, (place >= begin) & (place >= 0)) & (slot < slots)
        sees = there[None, :] & (r >= 0)[:, None]
        at = (bh * slots + slot)[:, None] * D + c[None, :]
        inside = there[:, None] & (c < D)[None, :]
        k = tl.load(win_k + at, mask=inside, other=0.0)
        v = tl.load(win_v + at, mask=inside, other=0.0)
    else:
        token = (split - HELD) * BLOCK + x
        there = token < new
        sees = there[None, :] & (token[None, :] <= first + (r // G)[:, None])
        at = (bh * new + token)[:, None] * D + c[None, :]
        inside = there[:, None] & (c < D)[None, :]
        k = tl.load(k_new + at, mask=inside, other=0.0)
        v = tl.load(v_new + at, mask=inside, other=0.0)
    row = bh * rows + r
    real = r < rows
    q = tl.load(q_ptr + row[:, None] * D + c[None, :], mask=real[:, None] & (c < D)[None, :], other=0.0)
    # tf32 holds bfloat16 and float16 exactly.
    s = tl.dot(q.to(tl.float32), tl.trans(k.to(tl.float32)), input_precision="tf32")
    s = tl.where(sees, s, float("-inf"))
    top = tl.max(s, 1)
    tl.atomic_max(best + row, top, mask=real & (top > float("-inf")))
    some = tl.where(top > float("-inf"), top, 0.0)
    p = tl.exp2((s - some[:, None]) * factor)
    out = tl.dot(p, v.to(tl.float32), input_precision="tf32")
    partial = row * partials + slot0 + split
    tl.store(acc + partial[:, None] * D + c[None, :], out, mask=real[:, None] & (c < D)[None, :])
    tl.store(ml + partial * 2, top * factor, mask=real)
    tl.store(ml + partial * 2 + 1, tl.sum(p, 1), mask=real)


@operator("window_rows_attention", mutates=["best", "acc", "ml"])
def window_rows_attention(
    q: Tensor, k: Tensor, v: Tensor, window_k: Tensor, window_v: Tensor, total: Tensor, low: Tensor, best: Tensor, acc: Tensor,
    ml: Tensor, slot0: int, init: int, first: int, positions: int, scaling: float,
) -> None:  # fmt: skip
    """Attention of consecutive new tokens to the window as it was before the pass, and causally among the new tokens.

    Parameters
    ----------
    q : Tensor ``[batch, kv_heads * positions * group, head_dim]``
        Rows of a KV head: the query heads of each position side by side.
    k, v : Tensor ``[batch, kv_heads, new, head_dim]``
        Of all new tokens of the pass.
    window_k, window_v, total, low, init
        See :func:`~alaya_hf.kernels.gpu.window.window_attention`; `total` counts the tokens before the pass.
    best : Tensor ``[batch, kv_heads, positions * group]`` float32
        Raised to the best raw score seen.
    acc, ml : Tensor ``[batch, kv_heads, positions * group, partials, head_dim]`` and ``[..., 2]`` float32
        Partials ``slot0 ... slot0 + splits(slots, new)`` are written.
    first : int
        New token that the first position is.

    Notes
    -----
    Writes neither window nor store: later positions must not find what earlier ones have to see go.
    """
    batch, heads, slots, d = window_k.shape
    new, rows = k.shape[2], q.shape[1] // heads
    check(q, "q", (batch, heads * rows, d))
    check(k, "k", (batch, heads, new, d))
    check(v, "v", (batch, heads, new, d))
    check(window_k, "window_k", (batch, heads, slots, d))
    check(window_v, "window_v", (batch, heads, slots, d))
    check(best, "best", (batch, heads, rows), torch.float32)
    check(acc, "acc", (batch, heads, rows, None, d), torch.float32)
    block = min(_ROWS, max(16, next_power_of_2(rows)))
    _window_rows[(splits(slots, new), batch * heads, -(-rows // block))](
        q, k, v, window_k, window_v, total, low, best, acc, ml,
        slots, slots - init, init, rows, new, first, acc.shape[3], slot0, scaling * LOG2E,
        H=heads, G=rows // positions, ROWS=block, D=d, DP2=next_power_of_2(d), BLOCK=window.BLOCK,
        HELD=window.splits(slots), num_warps=4,
    )  # fmt: skip


def window_rows_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, window_k: Tensor, window_v: Tensor, total: Tensor, low: Tensor, best: Tensor, acc: Tensor,
    ml: Tensor, slot0: int, init: int, first: int, positions: int, scaling: float,
) -> None:  # fmt: skip
    """:func:`window_rows_attention` in plain torch: one partial, the others empty."""
    batch, heads, slots, d = window_k.shape
    ring, new, count = slots - init, k.shape[2], splits(slots, k.shape[2])
    rows = q.view(batch, heads, positions, -1, d)
    ml[..., slot0 : slot0 + count, 0], ml[..., slot0 : slot0 + count, 1] = float("-inf"), 0.0
    future = torch.arange(new, device=q.device) > first + torch.arange(positions, device=q.device)[:, None]
    for row in range(batch):
        held = list(range(min(init, int(total[row]))))
        held += [init + x % ring for x in range(int(low[row]), int(total[row]) - init)]
        keys, values = (torch.cat([x[row][:, held], y[row]], 1).float() for x, y in ((window_k, k), (window_v, v)))
        s = torch.einsum("hpgd,htd->hpgt", rows[row].float(), keys)
        s[..., len(held) :] = s[..., len(held) :].masked_fill(future[:, None], float("-inf"))
        s = s.flatten(1, 2)
        top = s.amax(-1)
        best[row] = torch.maximum(best[row], top)
        weights = torch.exp2((s - top.unsqueeze(-1)) * (scaling * LOG2E))
        acc[row, :, :, slot0] = weights @ values
        ml[row, :, :, slot0, 0], ml[row, :, :, slot0, 1] = top * (scaling * LOG2E), weights.sum(-1)


__all__ = ["splits", "window_rows_attention", "window_rows_attention_reference"]
