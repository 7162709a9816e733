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
        """See :meth:`LayerStore.pieces`: maximal runs."""
        pool, found, begin = self.group.pool, [], 0
        size = self.kv_heads * self.form.row
        for offset, tokens in self.group.runs(row, self.slot):
            first, last = max(begin, start), min(begin + tokens, stop)
            if first < last and pool is not None:
                at = offset // self.form.dtype.itemsize + (first - begin) * size
                lines = pool.memory[at : at + (last - first) * size]
                found.append(lines.view(last - first, self.kv_heads, *self.form.tail).transpose(0, 1))
            begin += tokens
            if begin >= stop:
                break
        return found

    def buffer(self, tokens: int) -> Tensor:
        """See :meth:`LayerStore.buffer`."""
        shape = (tokens, self.kv_heads, *self.form.tail)
        return torch.empty(shape, dtype=self.form.dtype, device=self.device).transpose(0, 1)

    def pack(self, keys: Tensor, values: Tensor) -> Tensor:
        """See :meth:`LayerStore.pack`."""
        return self.form.pack(keys.transpose(0, 1), values.transpose(0, 1)).transpose(0, 1)
