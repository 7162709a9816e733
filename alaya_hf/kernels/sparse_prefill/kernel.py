"""Tile-skipping attention in Triton."""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import OutOfResources
from triton.tools.tensor_descriptor import TensorDescriptor

from alaya_hf.kernels.gpu.op import LN2, LOG2E, next_power_of_2, operator
from alaya_hf.kernels.partial import Partial
from alaya_hf.kernels.sparse_prefill.tiles import Q_TILE, SparsePartial, TileRule, off_diagonal, tile_counts
from alaya_hf.kernels.sparse_prefill.tuning import cuts


@triton.jit
def _dot(a, b, acc, INTERPRETED: tl.constexpr):  # type: ignore[no-untyped-def]
    if INTERPRETED:  # its product takes bfloat16 for integers
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc)


@triton.jit
def _rows_at(tiles, b, head, start, ROWS: tl.constexpr, DP2: tl.constexpr):  # type: ignore[no-untyped-def]
    """``[ROWS, DP2]`` of a descriptor of ``[batch, kv_heads, n, head_dim]``, zero beyond its ends."""
    return tl.reshape(tiles.load([b, head, start, 0]), [ROWS, DP2])


@triton.jit
def _add_tile(s, v, acc, weight, peak, factor, EMPTY: tl.constexpr, INTERPRETED: tl.constexpr):  # type: ignore[no-untyped-def]
    """One tile of the online softmax: scores `s`, values `v`; `peak` is the largest score of each row so far.

    EMPTY: some rows may have no score yet.
    """
    new = tl.maximum(peak, tl.max(s, 1))
    base = new
    if EMPTY:
        base = tl.where(new > float("-inf"), new, 0.0)
    # One multiplication and addition per score: the factor from scores to powers of two is folded in.
    p = tl.exp2(s * factor - (base * factor)[:, None])
    shrink = tl.exp2((peak - base) * factor)
    weight = weight * shrink + tl.sum(p, 1)
    acc = _dot(p.to(v.dtype), v, acc * shrink[:, None], INTERPRETED)
    return acc, weight, new


@triton.jit
def _diagonal(  # type: ignore[no-untyped-def]
    q, k_tiles, v_tiles, acc, weight, peak, b, kv_head, rows, full, end, m, n, factor,
    BN: tl.constexpr, DP2: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """The key tiles ``[full, end)``, which a causal mask cuts."""
    j = tl.arange(0, BN)
    # The interpreter's range() takes numbers only.
    for i in tl.range(
        full.handle.data.item() if INTERPRETED else full, end.handle.data.item() if INTERPRETED else end, num_stages=1
    ):
        key = i * BN + j
        k = _rows_at(k_tiles, b, kv_head, i * BN, BN, DP2)
        s = _dot(q, tl.trans(k), tl.zeros([rows.shape[0], BN], tl.float32), INTERPRETED)
        s = tl.where((key[None, :] <= (n - m) + rows[:, None]) & (key < n)[None, :], s, float("-inf"))
        v = _rows_at(v_tiles, b, kv_head, i * BN, BN, DP2)
        acc, weight, peak = _add_tile(s, v, acc, weight, peak, factor, True, INTERPRETED)
    return acc, weight, peak


@triton.jit
def _sparse_attention(  # type: ignore[no-untyped-def]
    q_ptr, k_tiles, v_tiles, limits, top, out, lse, skipped, record,
    q_b, q_h, q_t, m, n, q_count, k_count, factor,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DP2: tl.constexpr, CAUSAL: tl.constexpr, SKIPS: tl.constexpr,
    RELATIVE: tl.constexpr, RECORD: tl.constexpr, RAGGED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    STAGES: tl.constexpr, LN2: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    # Heads side by side, the longest rows of a causal mask of all of them first: the last programs are the short ones.
    head = tl.program_id(0)
    tile = q_count - 1 - tl.program_id(1)
    b = tl.program_id(2)
    kv_head = head // G
    rows = tile * BM + tl.arange(0, BM)
    mine = rows < m
    c = tl.arange(0, DP2)
    there = c < D
    j = tl.arange(0, BN)
    q_at = q_ptr + b.to(tl.int64) * q_b + head.to(tl.int64) * q_h + rows.to(tl.int64)[:, None] * q_t + c[None, :]
    q = tl.load(q_at, mask=mine[:, None] & there[None, :], other=0.0)
    at = (b.to(tl.int64) * H + head) * m + rows
    acc = tl.zeros([BM, DP2], tl.float32)
    weight = tl.zeros([BM], tl.float32)
    zero = tl.zeros([BM, BN], tl.float32)
    peak = tl.full([BM], float("-inf"), tl.float32)
    running = peak
    limit = 0.0
    if SKIPS:
        limit = tl.load(limits + head * q_count + tile)
    if RELATIVE:
        running = tl.load(top + at, mask=mine, other=0.0)
    # See tiles.span.
    if CAUSAL:
        before = n - m + tile * BM
        full = tl.maximum(before + 1, 0) // BN
        end = (tl.maximum(n - m + tl.minimum(m, tile * BM + BM), 0) + BN - 1) // BN
        if SKIPS:
            acc, weight, peak = _diagonal(
                q, k_tiles, v_tiles, acc, weight, peak, b, kv_head, rows, full, end, m, n, factor, BN, DP2, INTERPRETED
            )
        if RELATIVE:
            running = tl.maximum(running, peak)
    else:
        full = (n + BN - 1) // BN
    count = 0
    # A number of stages on the loop itself: the values, which are read in a branch, travel ahead like the keys.
    for i in tl.range(0, full.handle.data.item() if INTERPRETED else full, num_stages=STAGES):
        k = _rows_at(k_tiles, b, kv_head, i * BN, BN, DP2)
        v = _rows_at(v_tiles, b, kv_head, i * BN, BN, DP2)
        s = _dot(q, tl.trans(k), zero, INTERPRETED)
        if RAGGED:
            s = tl.where((i * BN + j < n)[None, :], s, float("-inf"))
        if SKIPS:
            best = tl.max(s, 1)
            if RELATIVE:
                # Not one comparison per row: a reduction that also takes the largest.
                over = tl.where(mine, best - (running + limit), float("-inf"))
                keep = tl.max(over, 0) >= 0
                running = tl.maximum(running, best)
            else:
                keep = tl.max(tl.where(mine, best, float("-inf")), 0) >= limit
            if keep:
                acc, weight, peak = _add_tile(s, v, acc, weight, peak, factor, False, INTERPRETED)
            count += 1 - keep.to(tl.int32)
            if RECORD:
                tl.store(record + ((b.to(tl.int64) * H + head) * q_count + tile) * k_count + i, 1 - keep.to(tl.int32))
        else:
            acc, weight, peak = _add_tile(s, v, acc, weight, peak, factor, False, INTERPRETED)
    if CAUSAL and not SKIPS:
        # Last where the order does not matter: sums that begin as zeros let the loop above overlap one tile's second product
        # with the next one's first.
        acc, weight, peak = _diagonal(
            q, k_tiles, v_tiles, acc, weight, peak, b, kv_head, rows, full, end, m, n, factor, BN, DP2, INTERPRETED
        )
    some = weight > 0
    share = tl.where(some, weight, 1.0)
    tl.store(out + at[:, None] * D + c[None, :], acc / share[:, None], mask=mine[:, None] & there[None, :])
    total = tl.where(some, (peak * factor + tl.log2(share)) * LN2, float("-inf"))
    tl.store(lse + at, total, mask=mine)
    if SKIPS:
        tl.store(skipped + (b * H + head) * q_count + tile, count)
    if RELATIVE:
        tl.store(top + at, running, mask=mine)


def _descriptor(x: Tensor, keys: int, padded: int) -> TensorDescriptor:
    """Tiles ``[keys, padded]`` of ``[batch, kv_heads, n, head_dim]``, which the hardware fetches by their coordinates."""
    # Dimensions of one element have any stride; the hardware wants multiples of 16 bytes.
    strides = [x.stride(2) if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True)]
    return TensorDescriptor(x, list(x.shape), [*strides[:3], 1], [1, 1, keys, padded])


def fetchable(x: Tensor) -> Tensor:
    """`x` ``[batch, kv_heads, n, head_dim]``, or a copy of it, as descriptors of memory can say it.

    Address and strides are then multiples of 16 bytes and vectors contiguous. The head dimension has to be a multiple of 8.
    """
    strides = [stride for size, stride in zip(x.shape[:3], x.stride(), strict=False) if size > 1]
    fits = x.stride(3) == 1 and x.data_ptr() % 16 == 0 and all(s and s * x.element_size() % 16 == 0 for s in strides)
    # A single row's stride stands in for those of other dimensions.
    fits = fits and x.stride(2) * x.element_size() % 16 == 0 and x.stride(2) > 0
    return x if fits else x.clone(memory_format=torch.contiguous_format)


@operator("sparse_prefill", mutates=["top", "out", "lse", "skipped", "record"])
def launch(
    q: Tensor, k: Tensor, v: Tensor, limits: Tensor | None, top: Tensor | None, out: Tensor, lse: Tensor,
    skipped: Tensor | None, record: Tensor | None, scaling: float, causal: bool, relative: bool,
) -> None:  # fmt: skip
    """Tile-skipping attention into preallocated buffers.

    Parameters
    ----------
    q : Tensor ``[batch, heads, m, head_dim]`` float16 or bfloat16
        With contiguous vectors and any other strides.
    k, v : Tensor ``[batch, kv_heads, n, head_dim]`` of the same dtype
        As :func:`fetchable` returns them.
    limits : Tensor ``[heads, q_tiles]`` float32, contiguous, optional
        None: dense attention; `top`, `skipped` and `record` have to be None, too.
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
    skips = limits is not None
    if (skipped is not None) != skips or (relative and top is None) or not (skips or (top is None and record is None)):
        raise ValueError("expected limits and skipped, and top for relative rules, or none of them for dense attention")
    padded = max(16, next_power_of_2(d))
    candidates = cuts(d, skips)
    for cut in candidates:
        try:
            _sparse_attention[(heads, q_tiles, batch)](
                q, _descriptor(k, cut.keys, padded), _descriptor(v, cut.keys, padded), lse if limits is None else limits,
                lse if top is None else top, out, lse, lse if skipped is None else skipped,
                lse if record is None else record, *q.stride()[:3], m, n, q_tiles, k_tiles, scaling * LOG2E,
                H=heads, G=heads // k.shape[1], D=d, DP2=padded, CAUSAL=causal, SKIPS=skips, RELATIVE=skips and relative,
                RECORD=record is not None, RAGGED=not causal and n % cut.keys != 0, BM=Q_TILE, BN=cut.keys,
                STAGES=cut.stages, LN2=LN2, INTERPRETED=os.environ.get("TRITON_INTERPRET") == "1", num_warps=cut.warps,
                num_stages=cut.stages,
            )  # fmt: skip
        except OutOfResources:
            if cut is candidates[-1]:
                raise
        else:
            return


def sparse_attention_kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rule: TileRule | None,
    scaling: float,
    causal: bool,
    top: Tensor | None,
    with_map: bool,
) -> SparsePartial:
    """See :func:`~alaya_hf.kernels.sparse_prefill.sparse_attention`: float16 or bfloat16, head dimensions up to 256.

    Notes
    -----
    One program per query tile and head, after FlashAttention 2 (arXiv 2307.08691). Scores and sums are float32; weights are
    rounded to the values' precision before the second product. Keys and values travel ahead of the work, values of skipped
    tiles too: a load that waited for the verdict would cost more than the bytes. What a skipped tile saves is its
    exponentials and its second product.
    """
    q = q if q.stride(-1) == 1 else q.contiguous()
    k, v = fetchable(k), fetchable(v)
    batch, heads, m, d = q.shape
    n = k.shape[2]
    q_tiles, k_tiles = tile_counts(m, n)
    out = torch.empty(batch, heads, m, d, dtype=torch.float32, device=q.device)
    lse = torch.empty(batch, heads, m, dtype=torch.float32, device=q.device)
    record = None
    if with_map:
        record = torch.zeros(batch, heads, q_tiles, k_tiles, dtype=torch.uint8, device=q.device)
    tiles = batch * heads * off_diagonal(m, n, causal)
    if rule is None:
        with torch.cuda.device_of(q):
            launch(q, k, v, None, None, out, lse, None, None, scaling, causal, False)
        return SparsePartial(
            Partial(out, lse), torch.zeros(batch, heads, q_tiles, dtype=torch.int32, device=q.device), tiles, record
        )
    skipped = torch.empty(batch, heads, q_tiles, dtype=torch.int32, device=q.device)
    running = top if top is None or top.is_contiguous() else top.contiguous()
    with torch.cuda.device_of(q):
        launch(q, k, v, rule.limits.contiguous(), running, out, lse, skipped, record, scaling, causal, rule.relative)
    if top is not None and running is not top:
        top.copy_(running)  # type: ignore[arg-type]
    return SparsePartial(Partial(out, lse), skipped, tiles, record)
