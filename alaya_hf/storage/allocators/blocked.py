"""Sequences as tables of blocks with reference counts: what `paged` and `segment` have in common."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from alaya_hf.storage.allocators.arena import Arena, open_arena
from alaya_hf.storage.allocators.base import Allocator, Extents, KVPool, check_positive
from alaya_hf.storage.allocators.shape import KVShape


@dataclass
class _State:
    length: int
    table: np.ndarray  # [blocks] int64


class BlockedPool(KVPool[_State]):
    """Blocks of a fixed number of tokens, all layers of them; a fork shares blocks.

    Parameters
    ----------
    shape : KVShape
    arena : Arena
    block : int
        Tokens per block.

    Attributes
    ----------
    blocks : int
        Blocks of the pool.
    """

    def __init__(self, shape: KVShape, arena: Arena, block: int) -> None:
        super().__init__(shape, arena)
        self.block = block
        self.block_bytes = block * shape.token_bytes
        self.blocks = arena.capacity // self.block_bytes
        self._references = np.zeros(self.blocks, np.int32)
        self._taken = 0

    @abstractmethod
    def _take(self, count: int, last: int | None) -> np.ndarray:
        """``[count]`` int64 free blocks, best after block ``last``; there are that many."""

    @abstractmethod
    def _give(self, blocks: np.ndarray) -> None:
        """Blocks that nobody refers to any more, ``[n]`` int64."""

    @abstractmethod
    def _offsets(self, table: np.ndarray) -> np.ndarray:
        """``[layers, n]`` byte offsets of the blocks' rows."""

    @abstractmethod
    def _copy_block(self, source: int, target: int, tokens: int) -> None:
        """The first tokens of a block in all layers."""

    def block_table(self, sequence: int) -> np.ndarray:
        """``[n]`` int64, the blocks of a sequence in the order of its tokens, as PagedAttention's kernels take them."""
        return self._state(sequence).table.copy()

    def _open(self, tokens: int) -> _State:
        state = _State(0, np.zeros(0, np.int64))
        self._grow(state, tokens)
        return state

    def _grow(self, state: _State, tokens: int) -> None:
        if tokens == 0:
            return
        length = state.length + tokens
        new = -(-length // self.block) - len(state.table)
        # The block that the new tokens begin in, if it is half full.
        shared = self._shared(state, state.length, state.length + 1 if state.length % self.block else state.length)
        self._check(new + len(shared))
        self._unshare(state, shared)
        if new:
            last = int(state.table[-1]) if len(state.table) else None
            state.table = np.concatenate([state.table, self._acquire(new, last)])
        state.length = length

    def _own(self, state: _State, start: int, stop: int) -> None:
        shared = self._shared(state, start, stop)
        self._check(len(shared))
        self._unshare(state, shared)

    def _share(self, state: _State, tokens: int) -> _State:
        table = state.table[: -(-tokens // self.block)].copy()
        self._references[table] += 1
        return _State(tokens, table)

    def _close(self, state: _State) -> None:
        self._references[state.table] -= 1
        idle = state.table[self._references[state.table] == 0]
        self._taken -= len(idle)
        self._give(idle)

    def _extents(self, state: _State) -> Extents:
        starts = np.arange(len(state.table) + 1, dtype=np.int64) * self.block
        return Extents(starts, self._offsets(state.table), state.length)

    def _reserved(self) -> int:
        return self._taken * self.block_bytes

    def _used(self) -> int:
        filled = np.zeros(self.blocks, np.int32)
        for state in self._states.values():
            full = state.length // self.block
            filled[state.table[:full]] = self.block
            ends = state.table[full:]
            filled[ends] = np.maximum(filled[ends], state.length % self.block)
        return int(filled.sum()) * self.shape.token_bytes

    def _check(self, needed: int) -> None:
        free = self.blocks - self._taken
        if needed > free:
            raise self._full(needed * self.block_bytes, free * self.block_bytes)

    def _acquire(self, count: int, last: int | None) -> np.ndarray:
        blocks = self._take(count, last)
        self._references[blocks] = 1
        self._taken += count
        return blocks

    def _shared(self, state: _State, start: int, stop: int) -> np.ndarray:
        """Places in the table of the blocks that hold one of these tokens and that others refer to as well."""
        places = np.arange(start // self.block, -(-stop // self.block) if stop > start else start // self.block)
        return places[self._references[state.table[places]] > 1]

    def _unshare(self, state: _State, places: np.ndarray) -> None:
        if not len(places):
            return
        old = state.table[places]
        new = self._acquire(len(places), int(state.table[places[0] - 1]) if places[0] else None)
        for place, source, target in zip(places.tolist(), old.tolist(), new.tolist(), strict=True):
            self._copy_block(source, target, min(self.block, state.length - place * self.block))
        self._references[old] -= 1
        state.table[places] = new


@dataclass(frozen=True)
class BlockedAllocator(Allocator):
    """A strategy over blocks of a fixed number of tokens.

    Parameters
    ----------
    block : int
        Tokens per block.
    """

    pool: ClassVar[type[BlockedPool]]

    block: int = 16

    def __post_init__(self) -> None:
        check_positive(self, "block")

    def open(
        self, shape: KVShape, capacity: int, device: torch.device | str | None = None, pinned: bool = False
    ) -> BlockedPool:
        """See :meth:`Allocator.open`."""
        where = None if device is None else torch.device(device)
        return self.pool(shape, open_arena(capacity, where, pinned), self.block)
