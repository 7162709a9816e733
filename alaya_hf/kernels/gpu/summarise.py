"""Make what stands for blocks of tokens: of a chunk of the prefill, or of what leaves the window during decoding."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from alaya_hf.kernels.gpu.block_layout import STRATEGIES, BlockLayout
from alaya_hf.kernels.gpu.layout import TILE
from alaya_hf.kernels.gpu.op import check, operator

_CHANNELS = 32  # of a block's tokens that are held at a time


@triton.jit
def _summarise(  # type: ignore[no-untyped-def]
    k_ptr, v_ptr, summaries, first_block, counts, total, low,
    k_b, k_h, k_t, v_b, v_h, v_t, capacity, init, local, ring,
    H: tl.constexpr, D: tl.constexpr, RING: tl.constexpr, BLOCK: tl.constexpr, CHANNELS: tl.constexpr,
    STRATEGY: tl.constexpr, COUNT: tl.constexpr, VECTORS: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    b = bh // H
    h = bh % H
    if RING:  # the blocks that hold the 64 oldest recent tokens of the window, if it is full
        begin = tl.load(low + b)
        full = tl.load(total + b) + 1 - init - begin >= local + 64
        block = begin // BLOCK + i
        start = block * BLOCK
        n = tl.where(full, tl.minimum(begin + 64 - start, BLOCK), 0)
    else:
        block = tl.load(first_block + b) + i
        start = i * BLOCK
        n = tl.minimum(tl.load(counts + b) - start, BLOCK)
    if (n > 0) & (block < capacity):
        t = tl.arange(0, BLOCK)
        real = t < n
        place = start + t
        if RING:
            place = init + place % ring
        at = place.to(tl.int64)[:, None]
        keys = k_ptr + b * k_b + h * k_h + at * k_t
        values = v_ptr + b * v_b + h * v_h + at * v_t
        even = tl.where(real, 1.0 / n.to(tl.float32), 0.0)
        weight = even
        if STRATEGY == 2:
            norm = tl.zeros([BLOCK], tl.float32)
            for c0 in range(0, D, CHANNELS):
                c = c0 + tl.arange(0, CHANNELS)
                k = tl.load(keys + c[None, :], mask=real[:, None] & (c < D)[None, :], other=0.0).to(tl.float32)
                norm += tl.sum(k * k, 1)
            # The largest ones in turn; all of them again where there are fewer than asked for.
            norm = tl.where(real, norm, -1.0)
            left = norm
            weight = tl.zeros([BLOCK], tl.float32)
            for _ in range(COUNT):
                left = tl.where(tl.max(left, 0) < 0, norm, left)
                chosen = t == tl.min(tl.where(left == tl.max(left, 0), t, BLOCK), 0)
                weight += tl.where(chosen, 1.0 / COUNT, 0.0)
                left = tl.where(chosen, -1.0, left)
        to = summaries + (bh * capacity + block) * VECTORS * D
        for c0 in range(0, D, CHANNELS):
            c = c0 + tl.arange(0, CHANNELS)
            inside = real[:, None] & (c < D)[None, :]
            k = tl.load(keys + c[None, :], mask=inside, other=0.0).to(tl.float32)
            k = tl.minimum(tl.maximum(k, -65000.0), 65000.0)
            if STRATEGY == 1:
                tl.store(to + c, tl.min(tl.where(inside, k, 65000.0), 0).to(tl.float16), mask=c < D)
                tl.store(to + D + c, tl.max(tl.where(inside, k, -65000.0), 0).to(tl.float16), mask=c < D)
            else:
                tl.store(to + c, tl.sum(k * weight[:, None], 0).to(tl.float16), mask=c < D)
            if VALUES:
                v = tl.load(values + c[None, :], mask=inside, other=0.0).to(tl.float32)
                v = tl.minimum(tl.maximum(v, -65000.0), 65000.0)
                tl.store(to + (VECTORS - 1) * D + c, tl.sum(v * even[:, None], 0).to(tl.float16), mask=c < D)


def _launch(layout: BlockLayout, grid: int, keys: Tensor, values: Tensor, summaries: Tensor, numbers: tuple[Tensor, ...],
            init: int, local: int, ring: int, is_ring: bool) -> None:  # fmt: skip
    batch, heads, _, d = keys.shape
    if keys.stride(3) != 1 or values.stride(3) != 1:
        raise ValueError("expected keys and values whose channels lie side by side")
    check(summaries, "summaries", (batch, heads, None, layout.vectors, d), torch.float16)
    _summarise[(grid, batch * heads)](
        keys, values, summaries, *numbers, *keys.stride()[:3], *values.stride()[:3], summaries.shape[2], init, local, ring,
        H=heads, D=d, RING=is_ring, BLOCK=layout.tokens, CHANNELS=_CHANNELS, STRATEGY=STRATEGIES[layout.strategy],
        COUNT=layout.count, VECTORS=layout.vectors, VALUES=layout.values, num_warps=8 if layout.tokens > 128 else 4,
    )  # fmt: skip


@operator("summarise_blocks", mutates=["summaries"])
def summarise_blocks(
    keys: Tensor, values: Tensor, summaries: Tensor, first_block: Tensor, counts: Tensor, block: int, strategy: str,
    representatives: int, means: bool,
) -> None:  # fmt: skip
    """Make what stands for the blocks of a chunk of tokens, which begins with a block.

    Parameters
    ----------
    keys, values : Tensor ``[batch, kv_heads, tokens, head_dim]``
        Any strides with channels side by side.
    summaries : Tensor ``[batch, kv_heads, blocks, vectors, head_dim]`` float16
        Written from ``first_block[row]`` on; the last block may be short. To grow a short block, pass its tokens again.
    first_block, counts : Tensor ``[batch]`` int32
        The block that the chunk begins with, and tokens of each row.
    block, strategy, representatives, means
        See :class:`~alaya_hf.kernels.gpu.block_layout.BlockLayout`: `tokens`, `strategy`, `count`, `values`.

    Notes
    -----
    Cost: one read of the keys (two for representatives) and, with `means`, of the values.
    """
    layout = BlockLayout(keys.shape[3], block, strategy, representatives, means)
    if keys.shape[2]:
        numbers = (first_block, counts, first_block, counts)
        _launch(layout, -(-keys.shape[2] // block), keys, values, summaries, numbers, 0, 0, 1, False)


def summarise_blocks_reference(
    keys: Tensor, values: Tensor, summaries: Tensor, first_block: Tensor, counts: Tensor, block: int, strategy: str,
    representatives: int, means: bool,
) -> None:  # fmt: skip
    """:func:`summarise_blocks` in plain torch."""
    layout = BlockLayout(keys.shape[3], block, strategy, representatives, means)
    for row, (first, count) in enumerate(zip(first_block.tolist(), counts.tolist(), strict=True)):
        made = layout.summarise(keys[row, :, :count], values[row, :, :count])
        summaries[row, :, first : first + made.shape[1]] = made


@operator("extend_blocks", mutates=["summaries"])
def extend_blocks(
    window_k: Tensor, window_v: Tensor, summaries: Tensor, total: Tensor, low: Tensor, init: int, local: int, block: int,
    strategy: str, representatives: int, means: bool,
) -> None:  # fmt: skip
    """Take the window's 64 oldest recent tokens into blocks, in rows where it holds ``local + 64`` of them; else do nothing.

    Parameters
    ----------
    window_k, window_v : Tensor ``[batch, kv_heads, init + ring, head_dim]``
        See :func:`~alaya_hf.kernels.gpu.window.window_attention`; called after it in the same step. The ring still holds the
        tokens before those 64 that are in the same block, for which it has to have room: ``local + max(64, block)``.
    summaries : Tensor ``[batch, kv_heads, blocks, vectors, head_dim]`` float16
        A block that grows is made anew: nothing else in the step may read it afterwards.
    total, low : Tensor ``[batch]`` int32
        As in this step's `window_attention`; :func:`~alaya_hf.kernels.gpu.window.advance` counts the move afterwards.
    block, strategy, representatives, means
        See :func:`summarise_blocks`.

    Raises
    ------
    ValueError
        For a ring that is too small.
    """
    layout = BlockLayout(window_k.shape[3], block, strategy, representatives, means)
    ring, needed = window_k.shape[2] - init, local + max(TILE, block)
    if ring < needed:
        raise ValueError(f"expected room for {needed} recent tokens in the window, got {ring}")
    numbers = (low, low, total, low)
    _launch(layout, max(1, TILE // block), window_k, window_v, summaries, numbers, init, local, ring, True)


def extend_blocks_reference(
    window_k: Tensor, window_v: Tensor, summaries: Tensor, total: Tensor, low: Tensor, init: int, local: int, block: int,
    strategy: str, representatives: int, means: bool,
) -> None:  # fmt: skip
    """:func:`extend_blocks` in plain torch."""
    layout = BlockLayout(window_k.shape[3], block, strategy, representatives, means)
    ring = window_k.shape[2] - init
    for row, (count, begin) in enumerate(zip(total.tolist(), low.tolist(), strict=True)):
        if count + 1 - init - begin >= local + TILE:
            first = begin // block
            slots = init + torch.arange(first * block, begin + TILE, device=low.device) % ring
            made = layout.summarise(window_k[row][:, slots], window_v[row][:, slots])
            room = min(made.shape[1], summaries.shape[2] - first)
            summaries[row, :, first : first + room] = made[:, :room]
