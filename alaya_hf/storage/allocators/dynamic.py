"""Grow and copy."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from alaya_hf.registry import ALLOCATORS
from alaya_hf.storage.allocators.arena import Arena, open_arena
from alaya_hf.storage.allocators.base import Allocator, Extents, KVPool, one_piece
from alaya_hf.storage.allocators.shape import KVShape
from alaya_hf.storage.runs import FreeRuns

ROUND = 512
"""Sizes are multiples of so many bytes, as in torch's caching allocator for CUDA."""


@dataclass
class _State:
    length: int
    starts: list[int] = field(default_factory=list)


class DynamicPool(KVPool[_State]):
    """``[tokens, kv_heads, 2, head_dim]`` per sequence and layer, each a run of its own. A fork copies."""

    def __init__(self, shape: KVShape, arena: Arena) -> None:
        super().__init__(shape, arena)
        self._free = FreeRuns()
        self._free.add(0, arena.capacity // ROUND * ROUND)

    def _open(self, tokens: int) -> _State:
        state = _State(0, [0] * self.shape.layers)
        self._grow(state, tokens)
        return state

    def _grow(self, state: _State, tokens: int) -> None:
        if tokens == 0:
            return
        old, new = self._size(state.length), self._size(state.length + tokens)
        # Planned on a copy of the list: a layer gives its old run back before the next one grows, so undoing is not easy.
        free, starts, least = self._free.copy(), [], self._free.total
        for source in state.starts:
            target = free.take(new, ROUND)
            if target is None:
                raise self._full(new, free.total, " in one run, while the old one is still held,")
            least = min(least, free.total)
            starts.append(target)
            if old:
                free.give(source, old)
        self._free = free
        self._peak = max(self._peak, self.arena.capacity // ROUND * ROUND - least)
        # In order: a layer may go where the one before it has left.
        for source, target in zip(state.starts, starts, strict=True):
            if old:
                self._copy(source, target, state.length * self.shape.row_bytes)
        state.length, state.starts = state.length + tokens, starts

    def _share(self, state: _State, tokens: int) -> _State:
        fork = self._open(tokens)
        for source, target in zip(state.starts, fork.starts, strict=True):
            if tokens:
                self._copy(source, target, tokens * self.shape.row_bytes)
        return fork

    def _close(self, state: _State) -> None:
        for start in state.starts if state.length else ():
            self._free.give(start, self._size(state.length))

    def _extents(self, state: _State) -> Extents:
        return one_piece(state.starts, state.length)

    def _size(self, tokens: int) -> int:
        return -(-tokens * self.shape.row_bytes // ROUND) * ROUND

    def _reserved(self) -> int:
        return self.arena.capacity // ROUND * ROUND - self._free.total

    def _used(self) -> int:
        return self.shape.token_bytes * sum(state.length for state in self._states.values())

    def _free_runs(self) -> tuple[int, int]:
        return self._free.total, self._free.largest


@ALLOCATORS.register("dynamic")
@dataclass(frozen=True)
class Dynamic(Allocator):
    """Every growth takes a new run and copies, one layer after the other, as Transformers' `DynamicCache` does.

    Each token of an answer copies the whole sequence.
    """

    def open(
        self, shape: KVShape, capacity: int, device: torch.device | str | None = None, pinned: bool = False
    ) -> DynamicPool:
        """See :meth:`Allocator.open`."""
        return DynamicPool(shape, open_arena(capacity, None if device is None else torch.device(device), pinned))
