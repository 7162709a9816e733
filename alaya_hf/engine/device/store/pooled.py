"""A layer's exact tokens in a pool that an allocator manages, attended where they lie."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from alaya_hf.engine.device.store.base import LayerStore
from alaya_hf.engine.device.store.group import Group
from alaya_hf.engine.device.store.pool import HostPool
from alaya_hf.kernels.gpu.store_format import StoreFormat
from alaya_hf.kernels.gpu.store_table import StoreTable


class PooledStore(LayerStore):
    """One layer of a :class:`Group`.

    Parameters
    ----------
    group : Group
    slot : int
        The layer, counted from the pool's first.
    kv_heads : int
    form : StoreFormat
    device : torch.device
    """

    def __init__(self, group: Group, slot: int, kv_heads: int, form: StoreFormat, device: torch.device) -> None:
        super().__init__(kv_heads, form, device)
        self.group, self.slot = group, slot
        self._seen: HostPool | None = None
        empty = torch.empty(0, dtype=form.dtype, device=device)
        self._view = StoreTable(empty, torch.full((group.batch, 1), -1, dtype=torch.int64, device=device), 0)

    @property
    def lines(self) -> int:
        """See :attr:`LayerStore.lines`."""
        return self.group.tokens

    @property
    def view(self) -> StoreTable:
        """See :attr:`LayerStore.view`."""
        pool = self.group.pool
        if pool is not None and pool is not self._seen:
            first, blocks = self.group.table(self.slot, self.device)
            self._view = StoreTable(pool.view(self.device)[first:], blocks, pool.block)
            self._seen = pool
        return self._view

    def grow(self, lines: int, capacity: int, used: Sequence[int], layers: int, wait: Callable[[], None]) -> None:
        """See :meth:`LayerStore.grow`."""
        if any(used) and lines > self.lines:
            wait()
        self.group.grow(lines, capacity)

    def take(self, rows: Sequence[int], used: Sequence[int], wait: Callable[[], None]) -> PooledStore:
        """See :meth:`LayerStore.take`: blocks are shared where the allocator can."""
        wait()
        group = self.group.fork(rows, used, self.slot)
        return PooledStore(group, self.slot, self.kv_heads, self.form, self.device)

    def open(self, used: Sequence[int]) -> None:
        """See :meth:`LayerStore.open`."""
        self.group.own(used)

    def pieces(self, row: int, start: int, stop: int) -> list[Tensor]:
        """See :meth:`LayerStore.pieces`: maximal runs, those of neighbouring blocks in one piece."""
        found: list[Tensor] = []
        shift, runs = self.group.runs(row, self.slot)
        begin = 0
        for offset, tokens, number, step in runs:
            first, last = max(begin, start) - begin, min(begin + tokens * number, stop) - begin
            while first < last:
                part, within = divmod(first, tokens)
                # Whole parts together; the piece that begins or ends within a part is one of its own.
                parts = (last - first) // tokens if within == 0 else 0
                size = tokens if parts else min(last - first, tokens - within)
                found.append(self._lines(shift + offset + part * step, within, size, max(1, parts), step))
                first += size * max(1, parts)
            begin += tokens * number
            if begin >= stop:
                break
        return found

    def _lines(self, offset: int, first: int, tokens: int, parts: int, step: int) -> Tensor:
        """``[kv_heads, parts, tokens, *form.tail]`` from line `first` of what lies at a byte of the pool on."""
        pool, row = self.group.pool, self.form.row
        assert pool is not None
        line, item = self.kv_heads * row, self.form.dtype.itemsize
        shape, strides = (self.kv_heads, parts, tokens, row), (row, step // item, line, 1)
        lines = pool.memory[offset // item + first * line :].as_strided(shape, strides)
        return lines.unflatten(3, self.form.tail) if len(self.form.tail) > 1 else lines

    def buffer(self, tokens: int) -> Tensor:
        """See :meth:`LayerStore.buffer`."""
        shape = (tokens, self.kv_heads, *self.form.tail)
        return torch.empty(shape, dtype=self.form.dtype, device=self.device).transpose(0, 1)

    def pack(self, keys: Tensor, values: Tensor) -> Tensor:
        """See :meth:`LayerStore.pack`."""
        return self.form.pack(keys.transpose(0, 1), values.transpose(0, 1)).transpose(0, 1)
