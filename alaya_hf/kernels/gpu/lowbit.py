"""The low-bit pass: one read of the low-bit copy gives approximate scores and the attention to every token."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from alaya_hf.kernels.gpu import lowbit_cuda, lowbit_rows_cuda, nvrtc
from alaya_hf.kernels.gpu.layout import TILE, Layout
from alaya_hf.kernels.gpu.op import LOG2E, check, next_power_of_2, operator
from alaya_hf.kernels.gpu.unpack import constants, load_keys, load_values

_ROWS = 64  # most query rows of one program of the Triton kernel


def splits(kv_rows: int, rows: int, layout: Layout, device: torch.device) -> int:
    """Partials per query row that fill the device, for `rows` query rows in each of ``batch * kv_heads``."""
    if device.type != "cuda":
        return 2
    if not nvrtc.available(device.index or 0):
        programs = kv_rows * -(-rows // _ROWS)
        return max(1, 4 * torch.cuda.get_device_properties(device).multi_processor_count // programs)
    if rows <= lowbit_cuda.ROWS:
        return max(1, lowbit_cuda.blocks_per_device(layout, device) // kv_rows)
    warps, blocks = lowbit_rows_cuda.grouping(rows)
    return max(1, lowbit_rows_cuda.blocks_per_device(layout, warps, device) // (kv_rows * blocks))


@triton.jit
def _lowbit(  # type: ignore[no-untyped-def]
    words, halves, q_ptr, lengths, best, tile_max, scores, acc_ptr, ml, capacity, partials, slot0, factor, beta,
    H: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP2: tl.constexpr,
    PADDED: tl.constexpr, KEY_BITS: tl.constexpr, VALUE_BITS: tl.constexpr, KEY_WORDS: tl.constexpr,
    VALUE_WORDS: tl.constexpr, KEY_PARAMS: tl.constexpr, VALUES: tl.constexpr, VALUE_PARAMS: tl.constexpr,
    RECORD: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    n = tl.load(lengths + bh // H)
    tiles = (n + 63) // 64
    parts = tl.num_programs(0)
    first = (tiles.to(tl.int64) * split // parts).to(tl.int32)
    last = (tiles.to(tl.int64) * (split + 1) // parts).to(tl.int32)
    g = tl.program_id(2) * GP + tl.arange(0, GP)
    c = tl.arange(0, DP2)
    t = tl.arange(0, 64)
    heads = g < G
    row = bh * G + g
    real = (c < D)[None, :] & (t >= 0)[:, None]
    q = tl.load(q_ptr + row[:, None] * D + c[None, :], mask=heads[:, None] & (c < D)[None, :], other=0.0).to(tl.float16)
    m = tl.full([GP], float("-inf"), tl.float32)
    weight = tl.zeros([GP], tl.float32)
    acc = tl.zeros([GP, DP2], tl.float32)
    tile = first
    while tile < last:  # not range(): Triton's interpreter takes no tensor there
        at = (bh * capacity + tile) * RECORD
        k = load_keys(words, halves, at, t[:, None], c[None, :], real, PADDED, KEY_BITS, KEY_WORDS, KEY_PARAMS)
        s = tl.dot(q, tl.trans(k.to(tl.float16)))
        s = tl.where((tile * 64 + t < n)[None, :], s, float("-inf")).to(tl.float16)
        tl.store(scores + row[:, None] * capacity * 64 + (tile * 64 + t)[None, :], s, mask=heads[:, None])
        s = s.to(tl.float32)
        top = tl.max(s, 1)
        tl.store(tile_max + row * capacity + tile, top.to(tl.float16), mask=heads)
        higher = tl.maximum(m, top)
        p = tl.exp2((s - higher[:, None]) * factor)
        old = tl.exp2((m - higher) * factor)
        v = load_values(
            words, halves, at, t[:, None], c[None, :], real, PADDED, VALUE_BITS, VALUE_WORDS, VALUES, VALUE_PARAMS
        )
        acc = acc * old[:, None] + tl.dot(p.to(tl.float16), v.to(tl.float16))
        weight = weight * old + tl.sum(p, 1)
        m = higher
        tile += 1
    tl.atomic_max(best + row, m, mask=heads & (m > float("-inf")))
    place = row * partials + slot0 + split
    tl.store(acc_ptr + place[:, None] * D + c[None, :], acc, mask=heads[:, None] & (c < D)[None, :])
    tl.store(ml + place * 2, m * factor, mask=heads)
    tl.store(ml + place * 2 + 1, weight, mask=heads)


@operator("lowbit_pass", mutates=["best", "tile_max", "scores", "acc", "ml"])
def lowbit_pass(
    records: Tensor, q: Tensor, lengths: Tensor, best: Tensor, tile_max: Tensor, scores: Tensor, acc: Tensor, ml: Tensor,
    slot0: int, parts: int, scaling: float, beta: float, key_bits: int, value_bits: int, positions: int = 1,
) -> None:  # fmt: skip
    """Score every token of the low-bit copy and attend to all of them.

    What is selected for exact attention is not known before the pass has ended; the gather takes the approximate terms of
    those tokens out again, so nothing is read twice.

    Parameters
    ----------
    records : Tensor ``[batch, kv_heads, tiles, record / 4]`` int32
    q : Tensor ``[batch, heads, head_dim]``
        bfloat16 or float16, contiguous. Its values, and raw scores, have to fit float16.
    lengths : Tensor ``[batch]`` int32
        Tokens of each row; the last tile may be short.
    best : Tensor ``[batch, kv_heads, group]`` float32
        Raised to the best score.
    tile_max : Tensor ``[batch, kv_heads, group, tiles]`` float16
        Best score of every tile of 64 tokens.
    scores : Tensor ``[batch, kv_heads, group, tiles * 64]`` float16
        Raw scores. Tiles without a token within `beta` of the best one seen so far may be left unwritten: with a query that
        keeps to that range nothing there is ever read.
    acc, ml : Tensor ``[batch, kv_heads, group, partials, head_dim]`` and ``[..., 2]`` float32
        Partials ``slot0 ... slot0 + parts`` are written.
    beta : float
        Range in units of scores; ``inf`` writes all scores.
    positions : int
        Positions of the pass; `group` is then rows, the query heads of each position side by side. All heads of a position can
        read what one of them selects, so what is written for one is written for all of them.

    Notes
    -----
    Cost: one read of the records for up to 64 rows; for more, blocks that read the same records run side by side. Weights
    come from the float16 scores, so that the gather can reproduce them.
    """
    batch, heads, capacity, _ = records.shape
    d = q.shape[2]
    group = q.shape[1] // heads
    layout = Layout(d, key_bits, value_bits)
    check(records, "records", (batch, heads, capacity, layout.record // 4), torch.int32)
    check(tile_max, "tile_max", (batch, heads, group, capacity), torch.float16)
    check(scores, "scores", (batch, heads, group, capacity * TILE), torch.float16)
    check(q, "q", (batch, heads * group, d), torch.float16, torch.bfloat16)
    check(acc, "acc", (batch, heads, group, None, d), torch.float32)
    partials = acc.shape[3]
    if q.is_cuda and nvrtc.available(q.device.index):
        sizes = [group, capacity, partials, slot0, float(scaling * LOG2E)]
        tensors = [records, q, lengths, best, tile_max, scores, acc, ml, heads]
        if group <= lowbit_cuda.ROWS:
            run, shared, _ = lowbit_cuda.kernel(layout, q.dtype == torch.bfloat16, q.device.index)
            run((parts, batch * heads, 1), 32 * lowbit_cuda.WARPS, shared, [*tensors, *sizes, float(beta)])
            return
        warps, blocks = lowbit_rows_cuda.grouping(group)
        run, shared = lowbit_rows_cuda.kernel(layout, q.dtype == torch.bfloat16, warps, q.device.index)
        # A warp decides for its rows: none may have a part of a position's heads alone.
        whole = lowbit_rows_cuda.ROWS % (group // positions) == 0
        arguments = [*tensors, group, blocks, *sizes[1:], float(beta) if whole else float("inf")]
        run((parts * blocks, batch * heads, 1), 32 * warps, shared, arguments)
        return
    rows = min(_ROWS, max(16, next_power_of_2(group)))
    _lowbit[(parts, batch * heads, -(-group // rows))](
        records, records.view(torch.float16), q, lengths, best, tile_max, scores, acc, ml, capacity, partials, slot0,
        scaling * LOG2E, beta, H=heads, G=group, GP=rows, D=d,
        DP2=next_power_of_2(layout.padded), **constants(layout), num_warps=8,
    )  # fmt: skip


def lowbit_pass_reference(
    records: Tensor, q: Tensor, lengths: Tensor, best: Tensor, tile_max: Tensor, scores: Tensor, acc: Tensor, ml: Tensor,
    slot0: int, parts: int, scaling: float, beta: float, key_bits: int, value_bits: int, positions: int = 1,
) -> None:  # fmt: skip
    """:func:`lowbit_pass` in plain torch, float32: one partial, the others empty; all scores written."""
    batch, heads, capacity, _ = records.shape
    k, v = Layout(q.shape[2], key_bits, value_bits).unpack(records)
    s = torch.einsum("bhgd,bhtd->bhgt", q.view(batch, heads, -1, q.shape[2]).float(), k)
    beyond = torch.arange(capacity * TILE, device=q.device) >= lengths.view(-1, 1, 1, 1)
    s = s.masked_fill(beyond, float("-inf")).half().float()
    v = v.masked_fill(beyond.view(batch, 1, -1, 1), 0.0)
    scores.copy_(s)
    tile_max.copy_(s.unflatten(-1, (capacity, TILE)).amax(-1))
    top = s.amax(-1)
    torch.maximum(best, top, out=best)
    weights = torch.exp2((s - top.nan_to_num(neginf=0.0).unsqueeze(-1)) * (scaling * LOG2E))
    ml[..., slot0 : slot0 + parts, 0], ml[..., slot0 : slot0 + parts, 1] = float("-inf"), 0.0
    acc[..., slot0, :] = weights @ v
    ml[..., slot0, 0], ml[..., slot0, 1] = top * (scaling * LOG2E), weights.sum(-1)
