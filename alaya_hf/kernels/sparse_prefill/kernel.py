"""Tile-skipping attention in Triton."""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from alaya_hf.kernels.gpu.op import LN2, LOG2E, next_power_of_2, operator
from alaya_hf.kernels.partial import Partial
from alaya_hf.kernels.sparse_prefill.tiles import K_TILE, Q_TILE, SparsePartial, TileRule, off_diagonal, tile_counts


@triton.jit
def _dot(a, b, acc, INTERPRETED: tl.constexpr):  # type: ignore[no-untyped-def]
    if INTERPRETED:  # its product takes bfloat16 for integers
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc)


@triton.jit
def _add_tile(s, v, acc, weight, peak, factor, INTERPRETED: tl.constexpr):  # type: ignore[no-untyped-def]
    """One tile of the online softmax: scores `s`, values `v`; `peak` is the largest score of each row so far."""
    new = tl.maximum(peak, tl.max(s, 1))
    some = tl.where(new > float("-inf"), new, 0.0)
    p = tl.exp2((s - some[:, None]) * factor)
    shrink = tl.exp2((peak - some) * factor)
    weight = weight * shrink + tl.sum(p, 1)
    acc = _dot(p.to(v.dtype), v, acc * shrink[:, None], INTERPRETED)
    return acc, weight, new


@triton.jit
def _sparse_attention(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, v_ptr, limits, top, out, lse, skipped, record,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, m, n, q_tiles, k_tiles, factor,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DP2: tl.constexpr, CAUSAL: tl.constexpr, RELATIVE: tl.constexpr,
    RECORD: tl.constexpr, RAGGED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, LN2: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    # The longest rows of a causal mask first.
    tile = q_tiles - 1 - tl.program_id(0)
    head = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    kv_head = (head // G).to(tl.int64)
    rows = tile * BM + tl.arange(0, BM)
    mine = rows < m
    c = tl.arange(0, DP2)
    there = c < D
    j = tl.arange(0, BN)
    q_at = q_ptr + b * q_b + head.to(tl.int64) * q_h + rows.to(tl.int64)[:, None] * q_t + c[None, :]
    q = tl.load(q_at, mask=mine[:, None] & there[None, :], other=0.0)
    k_at = k_ptr + b * k_b + kv_head * k_h + j[None, :] * k_t + c[:, None]
    v_at = v_ptr + b * v_b + kv_head * v_h + j[:, None] * v_t + c[None, :]
    limit = tl.load(limits + head * q_tiles + tile)
    at = (b * H + head) * m + rows
    acc = tl.zeros([BM, DP2], tl.float32)
    weight = tl.zeros([BM], tl.float32)
    zero = tl.zeros([BM, BN], tl.float32)
    peak = tl.full([BM], float("-inf"), tl.float32)
    if RELATIVE:
        running = tl.load(top + at, mask=mine, other=0.0)
    else:
        running = peak
    # See tiles.span.
    if CAUSAL:
        before = n - m + tile * BM
        full = tl.maximum(before + 1, 0) // BN
        end = (tl.maximum(n - m + tl.minimum(m, tile * BM + BM), 0) + BN - 1) // BN
        k_diagonal = k_at + (full * BN).to(tl.int64) * k_t
        v_diagonal = v_at + (full * BN).to(tl.int64) * v_t
        # The interpreter's range() takes numbers only, and the compiler pipelines no other kind of loop.
        for i in range(
            full.handle.data.item() if INTERPRETED else full, end.handle.data.item() if INTERPRETED else end
        ):
            key = i * BN + j
            inside = key < n
            k = tl.load(k_diagonal, mask=there[:, None] & inside[None, :], other=0.0)
            s = _dot(q, k, zero, INTERPRETED)
            s = tl.where((key[None, :] <= (n - m) + rows[:, None]) & inside[None, :], s, float("-inf"))
            v = tl.load(v_diagonal, mask=inside[:, None] & there[None, :], other=0.0)
            acc, weight, peak = _add_tile(s, v, acc, weight, peak, factor, INTERPRETED)
            k_diagonal += BN * k_t
            v_diagonal += BN * v_t
        if RELATIVE:
            running = tl.maximum(running, peak)
    else:
        full = (n + BN - 1) // BN
    count = 0
    for i in range(0, full.handle.data.item() if INTERPRETED else full):
        inside = i * BN + j < n
        if RAGGED:
            k = tl.load(k_at, mask=there[:, None] & inside[None, :], other=0.0)
        elif D == DP2:
            k = tl.load(k_at)
        else:
            k = tl.load(k_at, mask=there[:, None], other=0.0)
        s = _dot(q, k, zero, INTERPRETED)
        if RAGGED:
            s = tl.where(inside[None, :], s, float("-inf"))
        best = tl.max(s, 1)
        if RELATIVE:
            reached = tl.sum((mine & ~(best < running + limit)).to(tl.int32), 0)
            keep = reached > 0
            running = tl.maximum(running, best)
        else:
            keep = tl.max(tl.where(mine, best, float("-inf")), 0) >= limit
        if keep:
            if RAGGED:
                v = tl.load(v_at, mask=inside[:, None] & there[None, :], other=0.0)
            elif D == DP2:
                v = tl.load(v_at)
            else:
                v = tl.load(v_at, mask=there[None, :], other=0.0)
            acc, weight, peak = _add_tile(s, v, acc, weight, peak, factor, INTERPRETED)
        k_at += BN * k_t
        v_at += BN * v_t
        count += 1 - keep.to(tl.int32)
        if RECORD:
            tl.store(record + ((b * H + head) * q_tiles + tile) * k_tiles + i, 1 - keep.to(tl.int32))
    some = weight > 0
    share = tl.where(some, weight, 1.0)
    tl.store(out + at[:, None] * D + c[None, :], acc / share[:, None], mask=mine[:, None] & there[None, :])
    total = tl.where(some, (peak * factor + tl.log2(share)) * LN2, float("-inf"))
    tl.store(lse + at, total, mask=mine)
    tl.store(skipped + (b * H + head) * q_tiles + tile, count)
    if RELATIVE:
        tl.store(top + at, running, mask=mine)


@operator("sparse_prefill", mutates=["top", "out", "lse", "skipped", "record"])
def launch(
    q: Tensor, k: Tensor, v: Tensor, limits: Tensor, top: Tensor | None, out: Tensor, lse: Tensor, skipped: Tensor,
    record: Tensor | None, scaling: float, causal: bool, relative: bool,
) -> None:  # fmt: skip
    """Tile-skipping attention into preallocated buffers.

    Parameters
    ----------
    q : Tensor ``[batch, heads, m, head_dim]`` float16 or bfloat16
    k, v : Tensor ``[batch, kv_heads, n, head_dim]`` of the same dtype
        All three with contiguous vectors and any other strides.
    limits : Tensor ``[heads, q_tiles]`` float32, contiguous
    top : Tensor ``[batch, heads, m]`` float32, contiguous
        For relative rules; raised.
    out, lse : Tensor ``[batch, heads, m, head_dim]`` and ``[batch, heads, m]`` float32, contiguous
        Written.
    skipped : Tensor ``[batch, heads, q_tiles]`` int32, contiguous
        Written.
    record : Tensor ``[batch, heads, q_tiles, k_tiles]`` uint8, contiguous, optional
        Off-diagonal tiles are written: 1 where skipped.
    """
    batch, heads, m, d = q.shape
    n = k.shape[2]
    q_tiles, k_tiles = tile_counts(m, n)
    for name, tensor in (
        ("limits", limits),
        ("out", out),
        ("lse", lse),
        ("skipped", skipped),
        ("top", top),
        ("record", record),
    ):
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"expected contiguous {name}, got strides {list(tensor.stride())}")
    padded = max(16, next_power_of_2(d))
    _sparse_attention[(q_tiles, heads, batch)](
        q, k, v, limits, lse if top is None else top, out, lse, skipped, skipped if record is None else record,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], m, n, q_tiles, k_tiles, scaling * LOG2E,
        H=heads, G=heads // k.shape[1], D=d, DP2=padded, CAUSAL=causal, RELATIVE=relative, RECORD=record is not None,
        RAGGED=not causal and n % K_TILE != 0, BM=Q_TILE, BN=K_TILE, LN2=LN2,
        INTERPRETED=os.environ.get("TRITON_INTERPRET") == "1",
        num_warps=4 if padded <= 64 else 8, num_stages=3 if padded <= 128 else 1,
    )  # fmt: skip


def sparse_attention_kernel(
    q: Tensor, k: Tensor, v: Tensor, rule: TileRule, scaling: float, causal: bool, top: Tensor | None, with_map: bool
) -> SparsePartial:
    """See :func:`~alaya_hf.kernels.sparse_prefill.sparse_attention`: float16 or bfloat16, head dimensions up to 256.

    Notes
    -----
    One program per query tile and head, after FlashAttention 2. Scores and sums are float32; weights are rounded to the
    values' precision before the second product.
    """
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    batch, heads, m, d = q.shape
    n = k.shape[2]
    q_tiles, k_tiles = tile_counts(m, n)
    out = torch.empty(batch, heads, m, d, dtype=torch.float32, device=q.device)
    lse = torch.empty(batch, heads, m, dtype=torch.float32, device=q.device)
    skipped = torch.empty(batch, heads, q_tiles, dtype=torch.int32, device=q.device)
    record = None
    if with_map:
        record = torch.zeros(batch, heads, q_tiles, k_tiles, dtype=torch.uint8, device=q.device)
    running = top if top is None or top.is_contiguous() else top.contiguous()
    with torch.cuda.device_of(q):
        launch(q, k, v, rule.limits.contiguous(), running, out, lse, skipped, record, scaling, causal, rule.relative)
    if top is not None and running is not top:
        top.copy_(running)  # type: ignore[arg-type]
    return SparsePartial(Partial(out, lse), skipped, batch * heads * off_diagonal(m, n, causal), record)
