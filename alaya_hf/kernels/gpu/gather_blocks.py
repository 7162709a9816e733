"""Exact attention to the tokens of the selected blocks, straight from host memory, in place of their estimates."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from alaya_hf.kernels.gpu.eight_bit import decode
from alaya_hf.kernels.gpu.op import LOG2E, check, next_power_of_2, operator
from alaya_hf.kernels.gpu.store_format import StoreFormat

_TOKENS = 64  # that a program serves at least
_PROGRAMS = 64  # per list at most, which bounds the partials


def per_program(cap: int, block: int) -> int:
    """Entries of a head's list that one program serves, together a multiple of 64 tokens."""
    least = max(1, _TOKENS // block)
    return -(-max(least, -(-cap // _PROGRAMS)) // least) * least


def splits(group: int, cap: int, block: int) -> int:
    """Partials per head."""
    return group * -(-cap // per_program(cap, block)) if cap else 0


@triton.jit
def _gather_blocks(  # type: ignore[no-untyped-def]
    store, scales, q_ptr, ids, counts, thresholds, limits, scores, summaries, low, acc_ptr, ml, fetched,
    store_capacity, capacity, columns, partials, slot0, factor,
    H: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP2: tl.constexpr, CAP: tl.constexpr,
    PER: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, UNION: tl.constexpr, VALUES: tl.constexpr,
    VECTORS: tl.constexpr, FORMAT: tl.constexpr, ROW: tl.constexpr, SCALES: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    PARTS: tl.constexpr = (CAP + PER - 1) // PER
    owner = part // PARTS  # the query head whose list this program serves
    first = part % PARTS * PER
    g = tl.arange(0, GP)
    c = tl.arange(0, DP2)
    t = tl.arange(0, CHUNK)
    heads = g < G
    row = bh * G + g
    tokens = tl.load(low + bh // H)
    listed = tl.minimum(tl.load(counts + bh * G + owner) - first, PER)  # entries of this program
    threshold = tl.load(thresholds + row, mask=heads, other=float("inf"))[:, None]
    limit = tl.load(limits + row, mask=heads, other=-1)[:, None]
    q = tl.load(q_ptr + row[:, None] * D + c[None, :], mask=heads[:, None] & (c < D)[None, :], other=0.0).to(tl.float32)
    m = tl.full([GP], float("-inf"), tl.float32)
    weight = tl.zeros([GP], tl.float32)
    acc = tl.zeros([GP, DP2], tl.float32)
    fetch = listed * 0
    begin = listed * 0
    while begin < listed * BLOCK:  # not range(): Triton's interpreter takes no tensor there
        entry = (begin + t) // BLOCK
        offset = (begin + t) % BLOCK
        there = entry < listed
        block = tl.load(ids + (bh * G + owner) * CAP + first + entry, mask=there, other=0)
        estimate = tl.load(
            scores + row[:, None] * columns + block[None, :], mask=heads[:, None] & there[None, :], other=float("-inf")
        ).to(tl.float32)
        chosen = (estimate > threshold) | ((estimate == threshold) & (block[None, :] <= limit))
        # A block that several heads selected is served once, by the first of them.
        there = there & (tl.max((chosen & (g < owner)[:, None]).to(tl.int32), 0) == 0)
        token = block * BLOCK + offset
        there = there & (token < tokens)
        fetch += tl.sum(there.to(tl.int32))
        inside = there[:, None] & (c < D)[None, :]
        line = bh * store_capacity + token
        k = tl.load(store + line[:, None] * ROW + c[None, :], mask=inside, other=0)
        v = tl.load(store + line[:, None] * ROW + D + c[None, :], mask=inside, other=0)
        mask = there[None, :] & heads[:, None]
        if not UNION:
            mask = mask & chosen
        # tf32 holds codes and 16-bit numbers exactly.
        s = tl.dot(q, tl.trans(decode(k, FORMAT)), input_precision="tf32")
        if FORMAT > 0:
            s *= tl.load(scales + line * (ROW // 4) + SCALES, mask=there, other=0.0)[None, :]
        s = tl.where(mask, s, float("-inf"))
        higher = tl.maximum(m, tl.max(s, 1))
        if VALUES:
            estimate = tl.where(mask & (offset == 0)[None, :], estimate, float("-inf"))  # once a block
            higher = tl.maximum(higher, tl.max(estimate, 1))
        some = tl.where(higher > float("-inf"), higher, 0.0)
        old = tl.exp2((m - some) * factor)
        p = tl.exp2((s - some[:, None]) * factor)
        weight = weight * old + tl.sum(p, 1)
        if FORMAT > 0:
            p *= tl.load(scales + line * (ROW // 4) + SCALES + 1, mask=there, other=0.0)[None, :]
            acc = acc * old[:, None] + tl.dot(p, decode(v, FORMAT), input_precision="tf32")
        else:
            acc = acc * old[:, None] + tl.dot(p, v.to(tl.float32), input_precision="tf32")
        if VALUES:
            size = tl.minimum(tokens - block * BLOCK, BLOCK).to(tl.float32)
            minus = tl.exp2((estimate - some[:, None]) * factor) * size[None, :]
            at = ((bh * capacity + block) * VECTORS + VECTORS - 1)[:, None] * D + c[None, :]
            mean = tl.load(summaries + at, mask=inside & (offset == 0)[:, None], other=0.0).to(tl.float32)
            weight -= tl.sum(minus, 1)
            acc -= tl.dot(minus, mean, input_precision="tf32")
        m = higher
        begin += CHUNK
    tl.store(fetched + bh * tl.num_programs(0) + part, fetch)
    place = row * partials + slot0 + part
    kept = heads & (fetch > 0)
    tl.store(acc_ptr + place[:, None] * D + c[None, :], acc, mask=kept[:, None] & (c < D)[None, :])
    tl.store(ml + place * 2, m * factor, mask=heads)
    tl.store(ml + place * 2 + 1, weight, mask=heads)


@operator("gather_blocks", mutates=["acc", "ml", "fetched"])
def gather_blocks(
    store: Tensor, q: Tensor, ids: Tensor, counts: Tensor, thresholds: Tensor, limits: Tensor, scores: Tensor,
    summaries: Tensor, low: Tensor, acc: Tensor, ml: Tensor, fetched: Tensor, slot0: int, scaling: float, block: int,
    union: bool, means: bool,
) -> None:  # fmt: skip
    """Attend to all tokens of the selected blocks and, with `means`, take the blocks' estimates out of the sums.

    Parameters
    ----------
    store : Tensor ``[batch, kv_heads, capacity, *tail]``
        Rows of a :class:`~alaya_hf.kernels.gpu.store_format.StoreFormat`, which its dtype tells; host memory through
        :func:`~alaya_hf.kernels.gpu.host_memory.device_view`.
    ids, counts, thresholds, limits : from :func:`~alaya_hf.kernels.gpu.cut.cut` over blocks
    scores, summaries, low : from and for :func:`~alaya_hf.kernels.gpu.block_scores.block_scores`
    acc, ml : Tensor
        Partials ``slot0 ... slot0 + splits(group, cap, block)`` are written. With `means`, exact terms minus estimates:
        single weights may be negative; the sum over all partials is not.
    fetched : Tensor ``[batch, kv_heads, splits(group, cap, block)]`` int32
        Tokens read; their sum over the last dimension is a KV head's.
    union : bool
        Each block serves every query head of its KV head, not only those that selected it.

    Notes
    -----
    Cost: each selected block's rows once over the bus, in runs of `block` rows.
    """
    batch, heads, group, cap = ids.shape
    d = q.shape[2]
    if cap == 0:
        return
    form, count = StoreFormat.of(store, d), splits(group, cap, block)
    check(fetched, "fetched", (batch, heads, count), torch.int32)
    check(acc, "acc", (batch, heads, group, None, d), torch.float32)
    elements, scales = form.kernel_views(store)
    _gather_blocks[(count, batch * heads)](
        elements, scales, q, ids, counts, thresholds, limits, scores, summaries, low, acc, ml, fetched,
        store.shape[2], summaries.shape[2], scores.shape[3], acc.shape[3], slot0, scaling * LOG2E,
        H=heads, G=group, GP=max(16, next_power_of_2(group)), D=d, DP2=next_power_of_2(d), CAP=cap,
        PER=per_program(cap, block), BLOCK=block, CHUNK=64 if d <= 128 else 32, UNION=union, VALUES=means,
        VECTORS=summaries.shape[3], FORMAT=form.code, ROW=form.row, SCALES=form.scale_place, num_warps=8,
    )  # fmt: skip


def gather_blocks_reference(
    store: Tensor, q: Tensor, ids: Tensor, counts: Tensor, thresholds: Tensor, limits: Tensor, scores: Tensor,
    summaries: Tensor, low: Tensor, acc: Tensor, ml: Tensor, fetched: Tensor, slot0: int, scaling: float, block: int,
    union: bool, means: bool,
) -> None:  # fmt: skip
    """:func:`gather_blocks` in plain torch, float32: one partial, the others empty."""
    batch, heads, group, cap = ids.shape
    d, n = q.shape[2], summaries.shape[2]
    if cap == 0:
        return
    place = torch.arange(cap, device=ids.device) < counts.unsqueeze(-1)
    asked = torch.zeros(batch, heads, group, n + 1, dtype=torch.bool, device=ids.device)
    asked.scatter_(-1, ids.long().masked_fill(~place, n).clamp(0, n), True)
    asked = asked[..., :n]
    if union:
        asked = asked.any(2, keepdim=True).expand_as(asked)
    per_token = asked.repeat_interleave(block, -1)
    per_token = per_token & (torch.arange(n * block, device=q.device) < low.view(-1, 1, 1, 1))
    needed = per_token.any(2)
    fetched.zero_()
    fetched[..., 0] = needed.sum(-1)
    some = min(n * block, store.shape[2])
    kv = torch.zeros(batch, heads, n * block, 2, d, device=q.device)
    kv[:, :, :some] = StoreFormat.of(store, d).unpack(store[:, :, :some].to(q.device))
    kv = torch.where(needed[..., None, None], kv, 0.0)
    exact = torch.einsum("bhgd,bhtd->bhgt", q.view(batch, heads, group, d).float(), kv[:, :, :, 0])
    exact = exact.masked_fill(~per_token, float("-inf"))
    estimate = scores[..., :n].float().masked_fill(~asked, float("-inf"))
    top = torch.maximum(exact.amax(-1), estimate.amax(-1)) if means else exact.amax(-1)
    shift, factor = top.nan_to_num(neginf=0.0).unsqueeze(-1), scaling * LOG2E
    part = slice(slot0, slot0 + splits(group, cap, block))
    ml[..., part, 0], ml[..., part, 1] = float("-inf"), 0.0
    weights = torch.exp2((exact - shift) * factor)
    acc[..., slot0, :], ml[..., slot0, 1] = weights @ kv[:, :, :, 1], weights.sum(-1)
    if means:
        sizes = (low.unsqueeze(-1) - block * torch.arange(n, device=q.device)).clamp(0, block).view(batch, 1, 1, -1)
        weights = torch.exp2((estimate - shift) * factor) * sizes
        acc[..., slot0, :] -= weights @ torch.where(asked.any(2).unsqueeze(-1), summaries[..., -1, :].float(), 0.0)
        ml[..., slot0, 1] -= weights.sum(-1)
    ml[..., slot0, 0] = top * factor
