"""One layer's decode step with blocks as the index: the kernels in order, over buffers that all layers share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from alaya_hf.kernels.gpu import block_scores, gather_blocks, merge, summarise, window
from alaya_hf.kernels.gpu import cut as cut_
from alaya_hf.kernels.gpu.block_layout import GROUPED, BlockLayout
from alaya_hf.kernels.gpu.op import next_power_of_2


@dataclass
class CoarseWorkspace:
    """Buffers of a step over blocks; one set serves all layers of a device that run one after the other.

    Parameters
    ----------
    batch, kv_heads, group : int
    layout : BlockLayout
    tokens : int
        That the summaries have room for, a multiple of the block.
    slots : int
        Of the window.
    cap : int
        Most exact blocks per query head.
    device : torch.device
    dtype : torch.dtype
        Of the output.
    """

    batch: int
    kv_heads: int
    group: int
    layout: BlockLayout
    tokens: int
    slots: int
    cap: int
    device: torch.device
    dtype: torch.dtype

    #: As :class:`~alaya_hf.kernels.gpu.step.Workspace` says it: one token at a time, no hot set.
    new: ClassVar[int] = 1
    positions: ClassVar[int] = 1
    hot: ClassVar[None] = None

    def __post_init__(self) -> None:
        block = self.layout.tokens
        if self.tokens % block:
            raise ValueError(f"expected room for a multiple of {block} tokens, got {self.tokens}")
        rows, device = (self.batch, self.kv_heads, self.group), self.device
        groups = -(-self.tokens // block // GROUPED)
        self.programs = block_scores.splits(self.batch * self.kv_heads, groups, device)
        self.window_parts = window.splits(self.slots)
        self.parts = self.programs if self.layout.values else 0
        self.gather_parts = gather_blocks.splits(self.group, self.cap, block)
        partials = self.window_parts + self.parts + self.gather_parts

        def make(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(*shape, dtype=dtype, device=device)

        self.best = torch.full(rows, float("-inf"), device=device)
        self.blocks = make(self.batch, dtype=torch.int32)
        self.group_max = make(*rows, groups, dtype=torch.float16)
        self.scores = make(*rows, groups * GROUPED, dtype=torch.float16)
        self.acc = make(*rows, partials, self.layout.head_dim)
        self.ml = make(*rows, partials, 2)
        self.ids = make(*rows, self.cap, dtype=torch.int32)
        self.counts = make(*rows, dtype=torch.int32)
        self.thresholds = make(*rows)
        self.limits = make(*rows, dtype=torch.int32)
        self.chosen = make(*rows, next_power_of_2(self.cap), dtype=torch.int32)
        self.fetched = torch.zeros(
            self.batch, self.kv_heads, max(1, self.gather_parts), dtype=torch.int32, device=device
        )
        self.out = make(self.batch, self.kv_heads * self.group, self.layout.head_dim, dtype=self.dtype)
        self.lse = make(self.batch, self.kv_heads * self.group)
        self.side = torch.cuda.Stream(device) if device.type == "cuda" else None

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        tensors = [x for x in vars(self).values() if isinstance(x, Tensor)]
        return sum(x.numel() * x.element_size() for x in tensors)


def coarse_step(
    work: CoarseWorkspace, q: Tensor, k: Tensor, v: Tensor, window_k: Tensor, window_v: Tensor, store: Tensor,
    summaries: Tensor, total: Tensor, low: Tensor, init: int, local: int, scaling: float, beta: float, union: bool = True,
) -> Tensor:  # fmt: skip
    """Append a token and attend: window exactly, the tokens of selected blocks exactly, the others by block means if kept.

    No host synchronisation and no allocation: capturable in a CUDA graph. After the last layer of a step, call
    :func:`~alaya_hf.kernels.gpu.window.advance` once.

    Parameters
    ----------
    work : CoarseWorkspace
    q : Tensor ``[batch, heads, head_dim]``
    k, v : Tensor ``[batch, kv_heads, head_dim]``
    window_k, window_v, store, total, low, init : see :func:`~alaya_hf.kernels.gpu.window.window_attention`
    summaries : Tensor ``[batch, kv_heads, blocks, vectors, head_dim]`` float16
    local : int
        Recent tokens that the window keeps at least.
    beta : float
        Range of scores below the best one, see :func:`~alaya_hf.kernels.gpu.cut.cut`.
    union : bool
        See :func:`~alaya_hf.kernels.gpu.gather_blocks.gather_blocks`.

    Returns
    -------
    Tensor ``[batch, heads, head_dim]``
        ``work.out``: overwritten by the next layer's step.
    """
    layout = work.layout
    block, means = layout.tokens, layout.values

    def at_the_window() -> None:
        window.window_attention(
            q, k, v, window_k, window_v, store, total, low, work.best, work.acc, work.ml, 0, init, scaling
        )

    if work.side is None:
        at_the_window()
    else:
        work.side.wait_stream(torch.cuda.current_stream(q.device))
        with torch.cuda.stream(work.side):
            at_the_window()
    block_scores.block_scores(
        summaries, q, low, work.blocks, work.best, work.group_max, work.scores, work.acc, work.ml, work.window_parts,
        work.programs, scaling, block, layout.strategy == "bounds", means,
    )  # fmt: skip
    if work.side is not None:
        torch.cuda.current_stream(q.device).wait_stream(work.side)
    # To the cut, blocks are what tokens are elsewhere.
    cut_.cut(
        work.group_max, work.scores, work.best, work.ml, work.blocks, work.ids, work.counts, work.thresholds, work.limits,
        work.chosen, work.window_parts, work.parts, scaling, beta, 1.0,
    )  # fmt: skip
    gather_blocks.gather_blocks(
        store, q, work.ids, work.counts, work.thresholds, work.limits, work.scores, summaries, low, work.acc, work.ml,
        work.fetched, work.window_parts + work.parts, scaling, block, union, means,
    )  # fmt: skip
    merge.merge_partials(work.acc, work.ml, work.out, work.lse, work.best)
    # Last: a block that grows is made anew, and scores and gather have to see the same one.
    summarise.extend_blocks(
        window_k, window_v, summaries, total, low, init, local, block, layout.strategy, layout.count, means
    )
    return work.out
