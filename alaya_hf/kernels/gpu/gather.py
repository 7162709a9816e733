"""Exact attention to the selected tokens, straight from host memory, in place of their approximate terms."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from alaya_hf.kernels.gpu.layout import TILE, Layout
from alaya_hf.kernels.gpu.op import LOG2E, check, next_power_of_2, operator
from alaya_hf.kernels.gpu.unpack import constants, load_values


def block(cap: int) -> int:
    """Places of a head's list that one program serves."""
    return 16 if cap <= 128 else 32


def splits(group: int, cap: int) -> int:
    """Partials per head."""
    return group * -(-cap // block(cap)) if cap else 0


@triton.jit
def _gather(  # type: ignore[no-untyped-def]
    store, q_ptr, ids, counts, thresholds, limits, scores, words, halves, acc, ml, fetched,
    store_capacity, capacity, partials, slot0, factor,
    G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP2: tl.constexpr, CAP: tl.constexpr, BLOCK: tl.constexpr,
    UNION: tl.constexpr, LOWBIT: tl.constexpr,
    PADDED: tl.constexpr, KEY_BITS: tl.constexpr, VALUE_BITS: tl.constexpr, KEY_WORDS: tl.constexpr,
    VALUE_WORDS: tl.constexpr, KEY_PARAMS: tl.constexpr, VALUES: tl.constexpr, VALUE_PARAMS: tl.constexpr,
    RECORD: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    CHUNKS: tl.constexpr = (CAP + BLOCK - 1) // BLOCK
    owner = part // CHUNKS  # the query head whose list this program serves
    x = part % CHUNKS * BLOCK + tl.arange(0, BLOCK)
    g = tl.arange(0, GP)
    c = tl.arange(0, DP2)
    heads = g < G
    row = bh * G + g
    there = x < tl.load(counts + bh * G + owner)
    place = row * partials + slot0 + part
    token = tl.load(ids + (bh * G + owner) * CAP + x, mask=there, other=0)
    approximate = tl.load(
        scores + row[:, None] * capacity * 64 + token[None, :],
        mask=heads[:, None] & there[None, :],
        other=float("-inf"),
    ).to(tl.float32)
    threshold = tl.load(thresholds + row, mask=heads, other=float("inf"))[:, None]
    limit = tl.load(limits + row, mask=heads, other=-1)[:, None]
    chosen = (approximate > threshold) | ((approximate == threshold) & (token[None, :] <= limit))
    # A token that several heads selected is served once, by the first of them.
    there = there & (tl.max((chosen & (g < owner)[:, None]).to(tl.int32), 0) == 0)
    fetch = tl.sum(there.to(tl.int32))
    tl.store(fetched + bh * tl.num_programs(0) + part, fetch)
    if fetch > 0:
        inside = there[:, None] & (c < D)[None, :]
        at = (bh * store_capacity + token)[:, None] * 2 * D + c[None, :]
        k = tl.load(store + at, mask=inside, other=0.0)
        v = tl.load(store + at + D, mask=inside, other=0.0)
        q = tl.load(q_ptr + row[:, None] * D + c[None, :], mask=heads[:, None] & (c < D)[None, :], other=0.0)
        mask = there[None, :] & heads[:, None]
        if not UNION:
            mask = mask & chosen
        s = tl.dot(q.to(tl.float32), tl.trans(k.to(tl.float32)), input_precision="tf32")  # exact for 16-bit types
        s = tl.where(mask, s, float("-inf"))
        approximate = tl.where(mask, approximate, float("-inf"))
        top = tl.max(tl.maximum(s, approximate), 1)
        some = tl.where(top > float("-inf"), top, 0.0)
        p = tl.exp2((s - some[:, None]) * factor)
        weight = tl.sum(p, 1)
        out = tl.dot(p, v.to(tl.float32), input_precision="tf32")
        if LOWBIT:
            minus = tl.exp2((approximate - some[:, None]) * factor)
            tile = (bh * capacity + token // 64) * RECORD
            rough = load_values(
                words, halves, tile[:, None], (token % 64)[:, None], c[None, :], inside,
                PADDED, VALUE_BITS, VALUE_WORDS, VALUES, VALUE_PARAMS,
            )  # fmt: skip
            weight -= tl.sum(minus, 1)
            out -= tl.dot(minus, rough, input_precision="tf32")
        tl.store(acc + place[:, None] * D + c[None, :], out, mask=heads[:, None] & (c < D)[None, :])
        tl.store(ml + place * 2, top * factor, mask=heads)
        tl.store(ml + place * 2 + 1, weight, mask=heads)
    else:
        tl.store(ml + place * 2, tl.full([GP], float("-inf"), tl.float32), mask=heads)
        tl.store(ml + place * 2 + 1, tl.zeros([GP], tl.float32), mask=heads)


@operator("gather_attention", mutates=["acc", "ml", "fetched"])
def gather_attention(
    store: Tensor, q: Tensor, ids: Tensor, counts: Tensor, thresholds: Tensor, limits: Tensor, scores: Tensor, records: Tensor,
    acc: Tensor, ml: Tensor, fetched: Tensor, slot0: int, scaling: float, key_bits: int, value_bits: int,
    union: bool, replace: bool,
) -> None:  # fmt: skip
    """Attend to the selected tokens, and take their approximate terms out of the low-bit pass's sums.

    Parameters
    ----------
    store : Tensor ``[batch, kv_heads, capacity, 2, head_dim]``
        Keys and values side by side; host memory through :func:`~alaya_hf.kernels.gpu.host_memory.device_view`.
    ids, counts, thresholds, limits : from `cut`; scores, records : from and for the pass
    acc, ml : Tensor
        Partials ``slot0 ... slot0 + splits(group, cap)`` are written: exact terms minus approximate ones, so single
        weights may be negative; the sum over all partials is not.
    fetched : Tensor ``[batch, kv_heads, splits(group, cap)]`` int32
        Tokens read; their sum over the last dimension is a KV head's.
    union : bool
        Each token serves every query head of its KV head, not only those that selected it.
    replace : bool
        False: nothing is taken out (no residual).
    """
    batch, heads, group, cap = ids.shape
    d = q.shape[2]
    if cap == 0:
        return
    layout = Layout(d, key_bits, value_bits)
    check(store, "store", (batch, heads, None, 2, d))
    check(fetched, "fetched", (batch, heads, splits(group, cap)), torch.int32)
    _gather[(splits(group, cap), batch * heads)](
        store, q, ids, counts, thresholds, limits, scores, records, records.view(torch.float16), acc, ml, fetched,
        store.shape[2], records.shape[2], acc.shape[3], slot0, scaling * LOG2E,
        G=group, GP=max(16, next_power_of_2(group)), D=d, DP2=next_power_of_2(d), CAP=cap, BLOCK=block(cap),
        UNION=union, LOWBIT=replace, **constants(layout), num_warps=4,
    )  # fmt: skip


def gather_attention_reference(
    store: Tensor, q: Tensor, ids: Tensor, counts: Tensor, thresholds: Tensor, limits: Tensor, scores: Tensor, records: Tensor,
    acc: Tensor, ml: Tensor, fetched: Tensor, slot0: int, scaling: float, key_bits: int, value_bits: int,
    union: bool, replace: bool,
) -> None:  # fmt: skip
    """:func:`gather_attention` in plain torch, float32: one partial, the others empty."""
    batch, heads, group, cap = ids.shape
    d, n = q.shape[2], scores.shape[3]
    place = torch.arange(cap, device=ids.device) < counts.unsqueeze(-1)
    listed = torch.zeros(batch, heads, group, n + 1, dtype=torch.bool, device=ids.device)
    listed.scatter_(-1, ids.long().masked_fill(~place, n).clamp(0, n), True)
    listed = listed[..., :n].any(2, keepdim=True)
    above, equal = scores.float() > thresholds.unsqueeze(-1), scores.float() == thresholds.unsqueeze(-1)
    chosen = above | (equal & (torch.arange(n, device=ids.device) <= limits.unsqueeze(-1)))
    mask = listed.expand(-1, -1, group, -1) if union else listed & chosen
    fetched.zero_()
    fetched[..., 0] = listed.sum((2, 3))
    some = min(n, store.shape[2])
    kv = torch.zeros(batch, heads, n, 2, d, device=q.device)
    kv[:, :, :some] = store[:, :, :some].float().to(q.device)
    kv = torch.where(listed.squeeze(2)[..., None, None], kv, 0.0)
    exact = torch.einsum("bhgd,bhtd->bhgt", q.view(batch, heads, group, d).float(), kv[:, :, :, 0])
    count = splits(group, cap)
    ml[..., slot0 : slot0 + count, 0], ml[..., slot0 : slot0 + count, 1] = float("-inf"), 0.0
    rough = Layout(d, key_bits, value_bits).unpack(records)[1]
    exact = exact.masked_fill(~mask, float("-inf"))
    approximate = scores.float().masked_fill(~mask, float("-inf"))
    top = torch.maximum(exact, approximate).amax(-1)
    shift, factor = top.nan_to_num(neginf=0.0).unsqueeze(-1), scaling * LOG2E
    weights = torch.exp2((exact - shift) * factor)
    acc[..., slot0, :], ml[..., slot0, 1] = weights @ kv[:, :, :, 1], weights.sum(-1)
    if replace:
        weights = torch.exp2((approximate - shift) * factor)
        acc[..., slot0, :] -= weights @ torch.where(listed.squeeze(2)[..., None], rough, 0.0)
        ml[..., slot0, 1] -= weights.sum(-1)
    ml[..., slot0, 0] = top * factor


__all__ = ["TILE", "block", "gather_attention", "gather_attention_reference", "splits"]
