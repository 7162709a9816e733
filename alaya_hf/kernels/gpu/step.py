"""One layer's decode step on the device: the kernels in order, over buffers that all layers share."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from alaya_hf.kernels.gpu import cut as cut_
from alaya_hf.kernels.gpu import gather, lowbit, merge, quantise, window, window_rows
from alaya_hf.kernels.gpu.append import leaving_tiles
from alaya_hf.kernels.gpu.hot_set import HotSet, insert_hot
from alaya_hf.kernels.gpu.layout import TILE, Layout
from alaya_hf.kernels.gpu.op import next_power_of_2
from alaya_hf.kernels.gpu.prefix import Prefix
from alaya_hf.kernels.gpu.store_format import StoreFormat
from alaya_hf.kernels.gpu.store_table import StoreTable


@dataclass
class Workspace:
    """Buffers of a step; one set serves all layers of a device that run one after the other.

    Parameters
    ----------
    batch, kv_heads, group : int
    layout : Layout
    tokens : int
        Capacity of the low-bit copy, a multiple of 64.
    slots : int
        Of the window.
    cap : int
        Most exact tokens per query head.
    device : torch.device
    dtype : torch.dtype
        Of the output.
    hot : StoreFormat, optional
        With a hot set: the store's rows, for which there is a staging buffer.
    new, positions : int
        Of a pass of several tokens: how many they are, and how many of them are worked on at a time. Where shapes of kernels
        say group, there are the rows of all these positions.
    """

    batch: int
    kv_heads: int
    group: int
    layout: Layout
    tokens: int
    slots: int
    cap: int
    device: torch.device
    dtype: torch.dtype
    hot: StoreFormat | None = None
    new: int = 1
    positions: int = 1

    def __post_init__(self) -> None:
        if self.tokens % TILE:
            raise ValueError(f"expected room for a multiple of {TILE} tokens, got {self.tokens}")
        rows, device = (self.batch, self.kv_heads, self.positions * self.group), self.device
        self.window_parts = window.splits(self.slots) if self.new == 1 else window_rows.splits(self.slots, self.new)
        self.parts = lowbit.splits(self.batch * self.kv_heads, rows[2], self.layout, device)
        self.gather_parts = gather.splits(self.group, self.cap)
        partials = self.window_parts + self.parts + self.gather_parts

        def make(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(*shape, dtype=dtype, device=device)

        self.best = torch.full(rows, float("-inf"), device=device)
        self.tile_max = make(*rows, self.tokens // TILE, dtype=torch.float16)
        self.scores = make(*rows, self.tokens, dtype=torch.float16)
        self.acc = make(*rows, partials, self.layout.head_dim)
        self.ml = make(*rows, partials, 2)
        self.ids = make(*rows, self.cap, dtype=torch.int32)
        self.counts = make(*rows, dtype=torch.int32)
        self.thresholds = make(*rows)
        self.limits = make(*rows, dtype=torch.int32)
        self.chosen = make(*rows, next_power_of_2(self.cap), dtype=torch.int32)
        self.fetched = make(self.batch, self.kv_heads, self.positions * max(1, self.gather_parts), dtype=torch.int32)
        self.out = make(self.batch, self.kv_heads * rows[2], self.layout.head_dim, dtype=self.dtype)
        self.lse = make(self.batch, self.kv_heads * rows[2])
        if self.hot is not None:
            places = (self.batch, self.kv_heads, max(1, self.gather_parts), gather.block(self.cap))
            self.missed = make(*places, dtype=torch.int32)
            self.staged = make(*places, *self.hot.tail, dtype=self.hot.dtype)
        if self.new > 1:
            left = (self.batch, self.kv_heads, TILE * leaving_tiles(self.new), self.layout.head_dim)
            self.left_k, self.left_v = make(*left, dtype=self.dtype), make(*left, dtype=self.dtype)
            self.first_tile, self.leaving = (make(self.batch, dtype=torch.int32) for _ in range(2))
        self.side = torch.cuda.Stream(device) if device.type == "cuda" else None

    def first(self, positions: int) -> Workspace:
        """The same memory for fewer positions at a time."""
        part = copy.copy(self)
        part.positions, rows = positions, positions * self.group
        for name in ("best", "tile_max", "scores", "acc", "ml", "ids", "counts", "thresholds", "limits", "chosen"):
            shape = (self.batch, self.kv_heads, rows, *getattr(self, name).shape[3:])
            setattr(part, name, _front(getattr(self, name), shape))
        part.fetched = _front(self.fetched, (self.batch, self.kv_heads, positions * max(1, self.gather_parts)))
        part.out = _front(self.out, (self.batch, self.kv_heads * rows, self.layout.head_dim))
        part.lse = _front(self.lse, (self.batch, self.kv_heads * rows))
        return part

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        tensors = [x for x in vars(self).values() if isinstance(x, Tensor)]
        return sum(x.numel() * x.element_size() for x in tensors)


def _front(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    return x.flatten()[: math.prod(shape)].view(shape)


def decode_step(
    work: Workspace, q: Tensor, k: Tensor, v: Tensor, window_k: Tensor, window_v: Tensor, store: Tensor | StoreTable,
    records: Tensor, total: Tensor, low: Tensor, init: int, local: int, scaling: float, beta: float, ratio: float = 1.0,
    union: bool = True, hot: HotSet | None = None, prefix: Prefix | None = None,
) -> Tensor:  # fmt: skip
    """Append a token and attend: window exactly, selected tokens exactly, all others from the low-bit copy.

    No host synchronisation and no allocation: capturable in a CUDA graph. After the last layer of a step, call
    :func:`~alaya_hf.kernels.gpu.window.advance` once.

    Parameters
    ----------
    work : Workspace
    q : Tensor ``[batch, heads, head_dim]``
    k, v : Tensor ``[batch, kv_heads, head_dim]``
    window_k, window_v, store, total, low, init : see :func:`~alaya_hf.kernels.gpu.window.window_attention`
        A table of a pool goes with neither hot set nor prefix.
    records : Tensor ``[batch, kv_heads, tiles, record / 4]`` int32
    local : int
        Recent tokens that the window keeps at least.
    beta, ratio : float
        See :func:`~alaya_hf.kernels.gpu.cut.cut`.
    union : bool
        See :func:`~alaya_hf.kernels.gpu.gather.gather_attention`.
    hot : HotSet, optional
        Of this layer; the workspace has to have its buffers.
    prefix : Prefix, optional
        Places whose rows lie elsewhere than in `store`.

    Returns
    -------
    Tensor ``[batch, heads, head_dim]``
        ``work.out``: overwritten by the next layer's step.
    """
    layout = work.layout
    bits = (layout.key_bits, layout.value_bits)
    after_window = work.window_parts + work.parts
    rows, *blocks = store if isinstance(store, StoreTable) else (store, None, 0)

    def at_the_window() -> None:
        window.window_attention(
            q, k, v, window_k, window_v, rows, total, low, work.best, work.acc, work.ml, 0, init, scaling,
            None if prefix is None else prefix.bounds, *blocks,
        )  # fmt: skip
        quantise.extend_lowbit(window_k, window_v, records, total, low, init, local, *bits)

    # A record that is extended now is read from the next step on: window and pass do not touch each other.
    if work.side is None:
        at_the_window()
    else:
        work.side.wait_stream(torch.cuda.current_stream(q.device))
        with torch.cuda.stream(work.side):
            at_the_window()
    lowbit.lowbit_pass(
        records, q, low, work.best, work.tile_max, work.scores, work.acc, work.ml, work.window_parts, work.parts, scaling,
        beta if ratio == 1 else float("inf"), *bits,
    )  # fmt: skip
    if work.side is not None:
        torch.cuda.current_stream(q.device).wait_stream(work.side)
    cut_.cut(
        work.tile_max, work.scores, work.best, work.ml, low, work.ids, work.counts, work.thresholds, work.limits, work.chosen,
        work.window_parts, work.parts, scaling, beta, ratio,
    )  # fmt: skip
    selected = (q, work.ids, work.counts, work.thresholds, work.limits, work.scores, records)
    to, how = (work.acc, work.ml, work.fetched), (after_window, scaling, *bits, union, True)
    where = (None, None) if prefix is None else prefix.selected(work.ids, work.counts)
    if isinstance(store, StoreTable):
        gather.gather_attention_blocks(store.rows, store.blocks, *selected, *to, store.block_tokens, *how)
    elif hot is None:
        gather.gather_attention(store, *selected, *to, *how, 1, *where)
    else:
        gather.gather_attention_hot(
            store,
            *selected,
            *to,
            hot.rows,
            hot.tags,
            hot.stamps,
            hot.claims,
            hot.counts,
            work.staged,
            work.missed,
            total,
            *how,
            *where,
        )
    merge.merge_partials(work.acc, work.ml, work.out, work.lse, work.best)
    if hot is not None and work.cap:
        insert_hot(work.staged, work.missed, total, hot.rows, hot.tags, hot.stamps, hot.claims)
    return work.out
