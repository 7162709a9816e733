"""Scores of all blocks, and on request an estimate of the attention to them from their mean keys and values."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from alaya_hf.kernels.gpu.block_layout import GROUPED, LARGEST
from alaya_hf.kernels.gpu.op import LOG2E, check, next_power_of_2, operator


def splits(kv_rows: int, groups: int, device: torch.device) -> int:
    """Programs per head that fill the device, for ``batch * kv_heads`` rows of so many groups of 64 blocks."""
    if device.type != "cuda":
        return 2
    return max(1, min(groups, 2 * torch.cuda.get_device_properties(device).multi_processor_count // kv_rows))


@triton.jit
def _block_scores(  # type: ignore[no-untyped-def]
    summaries, q_ptr, low, blocks, best, group_max, scores, acc_ptr, ml, capacity, groups, partials, slot0, factor,
    H: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP2: tl.constexpr, BLOCK: tl.constexpr,
    BOUNDS: tl.constexpr, VECTORS: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    tokens = tl.load(low + bh // H)
    n = (tokens + BLOCK - 1) // BLOCK
    tl.store(blocks + bh // H, n)  # every program of the row says the same
    used = (n + 63) // 64
    parts = tl.num_programs(0)
    first = used * split // parts
    last = used * (split + 1) // parts
    g = tl.arange(0, GP)
    c = tl.arange(0, DP2)
    t = tl.arange(0, 64)
    heads = g < G
    row = bh * G + g
    # tf32 holds float16 and bfloat16 exactly.
    q = tl.load(q_ptr + row[:, None] * D + c[None, :], mask=heads[:, None] & (c < D)[None, :], other=0.0).to(tl.float32)
    m = tl.full([GP], float("-inf"), tl.float32)
    weight = tl.zeros([GP], tl.float32)
    acc = tl.zeros([GP, DP2], tl.float32)
    group = first
    while group < last:  # not range(): Triton's interpreter takes no tensor there
        block = group * 64 + t
        there = block < n
        inside = there[:, None] & (c < D)[None, :]
        at = summaries + ((bh * capacity + block) * VECTORS)[:, None] * D + c[None, :]
        k = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        if BOUNDS:
            high = tl.load(at + D, mask=inside, other=0.0).to(tl.float32)
            s = tl.dot(tl.maximum(q, 0.0), tl.trans(high), input_precision="tf32")
            s += tl.dot(tl.minimum(q, 0.0), tl.trans(k), input_precision="tf32")
        else:
            s = tl.dot(q, tl.trans(k), input_precision="tf32")
        s = tl.minimum(tl.maximum(s, -65000.0), 65000.0)
        s = tl.where(there[None, :], s, float("-inf")).to(tl.float16)
        tl.store(scores + row[:, None] * groups * 64 + block[None, :], s, mask=heads[:, None])
        s = s.to(tl.float32)
        top = tl.max(s, 1)
        tl.store(group_max + row * groups + group, top.to(tl.float16), mask=heads)
        higher = tl.maximum(m, top)
        if VALUES:
            size = tl.minimum(tokens - block * BLOCK, BLOCK).to(tl.float32)
            p = tl.exp2((s - higher[:, None]) * factor) * tl.where(there, size, 0.0)[None, :]
            old = tl.exp2((m - higher) * factor)
            v = tl.load(at + (VECTORS - 1) * D, mask=inside, other=0.0).to(tl.float32)
            acc = acc * old[:, None] + tl.dot(p, v, input_precision="tf32")
            weight = weight * old + tl.sum(p, 1)
        m = higher
        group += 1
    tl.atomic_max(best + row, m, mask=heads & (m > float("-inf")))
    if VALUES:
        place = row * partials + slot0 + split
        tl.store(acc_ptr + place[:, None] * D + c[None, :], acc, mask=heads[:, None] & (c < D)[None, :])
        tl.store(ml + place * 2, m * factor, mask=heads)
        tl.store(ml + place * 2 + 1, weight, mask=heads)


@operator("block_scores", mutates=["blocks", "best", "group_max", "scores", "acc", "ml"])
def block_scores(
    summaries: Tensor, q: Tensor, low: Tensor, blocks: Tensor, best: Tensor, group_max: Tensor, scores: Tensor, acc: Tensor,
    ml: Tensor, slot0: int, programs: int, scaling: float, block: int, bounds: bool, means: bool,
) -> None:  # fmt: skip
    """Score every block, and with `means` attend to all of them by their means.

    A block's score is the query's inner product with its key vector, or with `bounds` the largest one that a key within the
    bounds could have. With `means`, a block's weight is that of its score times its tokens.

    Parameters
    ----------
    summaries : Tensor ``[batch, kv_heads, blocks, vectors, head_dim]`` float16
        See :class:`~alaya_hf.kernels.gpu.block_layout.BlockLayout`.
    q : Tensor ``[batch, heads, head_dim]``
    low : Tensor ``[batch]`` int32
        Tokens that are in blocks; the last block may be short.
    blocks : Tensor ``[batch]`` int32
        Receives their blocks: the lengths that :func:`~alaya_hf.kernels.gpu.cut.cut` takes.
    best : Tensor ``[batch, kv_heads, group]`` float32
        Raised to the best score.
    group_max : Tensor ``[batch, kv_heads, group, groups]`` float16
        Best score of every 64 blocks.
    scores : Tensor ``[batch, kv_heads, group, groups * 64]`` float16
        Raw scores; beyond the last block of a row, -inf or untouched.
    acc, ml : Tensor ``[batch, kv_heads, group, partials, head_dim]`` and ``[..., 2]`` float32
        With `means`, partials ``slot0 ... slot0 + programs`` are written.

    Notes
    -----
    Cost: one read of the summaries. Weights come from the float16 scores, so that the gather can reproduce them.
    """
    batch, heads, capacity, vectors, d = summaries.shape
    group, groups = q.shape[1] // heads, group_max.shape[3]
    check(summaries, "summaries", (batch, heads, capacity, 1 + bounds + means, d), torch.float16)
    check(q, "q", (batch, heads * group, d), torch.float16, torch.bfloat16)
    check(blocks, "blocks", (batch,), torch.int32)
    check(group_max, "group_max", (batch, heads, group, -(-capacity // GROUPED)), torch.float16)
    check(scores, "scores", (batch, heads, group, groups * GROUPED), torch.float16)
    check(acc, "acc", (batch, heads, group, None, d), torch.float32)
    _block_scores[(programs, batch * heads)](
        summaries, q, low, blocks, best, group_max, scores, acc, ml, capacity, groups, acc.shape[3], slot0, scaling * LOG2E,
        H=heads, G=group, GP=max(16, next_power_of_2(group)), D=d, DP2=next_power_of_2(d), BLOCK=block, BOUNDS=bounds,
        VECTORS=vectors, VALUES=means, num_warps=4 if d <= 128 else 8,
    )  # fmt: skip


def block_scores_reference(
    summaries: Tensor, q: Tensor, low: Tensor, blocks: Tensor, best: Tensor, group_max: Tensor, scores: Tensor, acc: Tensor,
    ml: Tensor, slot0: int, programs: int, scaling: float, block: int, bounds: bool, means: bool,
) -> None:  # fmt: skip
    """:func:`block_scores` in plain torch, float32: one partial, the others empty."""
    batch, heads, capacity, _, d = summaries.shape
    x, every = q.view(batch, heads, -1, d).float(), summaries.float()
    if bounds:
        s = torch.einsum("bhgd,bhnd->bhgn", x.clamp(min=0), every[..., 1, :])
        s += torch.einsum("bhgd,bhnd->bhgn", x.clamp(max=0), every[..., 0, :])
    else:
        s = torch.einsum("bhgd,bhnd->bhgn", x, every[..., 0, :])
    blocks.copy_((low + block - 1) // block)
    beyond = (torch.arange(capacity, device=q.device) >= blocks.unsqueeze(-1)).view(batch, 1, 1, -1)
    s = s.clamp(-LARGEST, LARGEST).masked_fill(beyond, float("-inf"))
    s = torch.nn.functional.pad(s, (0, scores.shape[3] - capacity), value=float("-inf")).half()
    scores.copy_(s)
    group_max.copy_(s.unflatten(-1, (-1, GROUPED)).amax(-1))
    s = s.float()[..., :capacity]
    top = s.amax(-1)
    torch.maximum(best, top, out=best)
    if means:
        sizes = (
            (low.unsqueeze(-1) - block * torch.arange(capacity, device=q.device)).clamp(0, block).view(batch, 1, 1, -1)
        )
        weights = torch.exp2((s - top.nan_to_num(neginf=0.0).unsqueeze(-1)) * (scaling * LOG2E)) * sizes
        part = slice(slot0, slot0 + programs)
        ml[..., part, 0], ml[..., part, 1] = float("-inf"), 0.0
        acc[..., slot0, :] = weights @ torch.where(beyond.transpose(2, 3), 0.0, every[..., -1, :])
        ml[..., slot0, 0], ml[..., slot0, 1] = top * (scaling * LOG2E), weights.sum(-1)
