"""The maximum, reserved ahead."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from alaya_hf.errors import PoolFullError
from alaya_hf.registry import ALLOCATORS
from alaya_hf.storage.allocators.arena import Arena, open_arena
from alaya_hf.storage.allocators.base import Allocator, Extents, KVPool, check_positive, one_piece
from alaya_hf.storage.allocators.shape import KVShape
from alaya_hf.storage.runs import FreeRuns


@dataclass
class _State:
    start: int
    length: int


class ContiguousPool(KVPool[_State]):
    """``[layers, max_tokens, kv_heads, 2, head_dim]`` per sequence, in one run. A fork copies."""

    def __init__(self, shape: KVShape, arena: Arena, max_tokens: int) -> None:
        super().__init__(shape, arena)
        self.max_tokens = max_tokens
        self._size = max_tokens * shape.token_bytes
        self._free = FreeRuns()
        self._free.add(0, arena.capacity)

    @property
    def layer_stride(self) -> int:
        """See :attr:`KVPool.layer_stride`."""
        return self.max_tokens * self.shape.row_bytes

    def _open(self, tokens: int) -> _State:
        self._check(tokens)
        start = self._free.take(self._size)
        if start is None:
            raise self._full(self._size, self._free.total, " in one run")
        return _State(start, tokens)

    def _grow(self, state: _State, tokens: int) -> None:
        self._check(state.length + tokens)
        state.length += tokens

    def _share(self, state: _State, tokens: int) -> _State:
        fork = self._open(tokens)
        for source, target in zip(self._layers(state), self._layers(fork), strict=True):
            if tokens:
                self._copy(source, target, tokens * self.shape.row_bytes)
        return fork

    def _close(self, state: _State) -> None:
        self._free.give(state.start, self._size)

    def _extents(self, state: _State) -> Extents:
        return one_piece(self._layers(state), state.length)

    def _layers(self, state: _State) -> list[int]:
        step = self.max_tokens * self.shape.row_bytes
        return [state.start + layer * step for layer in range(self.shape.layers)]

    def _reserved(self) -> int:
        return self.arena.capacity - self._free.total

    def _used(self) -> int:
        return self.shape.token_bytes * sum(state.length for state in self._states.values())

    def _free_runs(self) -> tuple[int, int]:
        return self._free.total, self._free.largest

    def _check(self, tokens: int) -> None:
        if tokens > self.max_tokens:
            raise PoolFullError(
                f"a sequence of {tokens:,} tokens exceeds the {self.max_tokens:,} that are reserved for each. "
                "Shorten it or raise the allocator's max_tokens."
            )


@ALLOCATORS.register("contiguous")
@dataclass(frozen=True)
class Contiguous(Allocator):
    """Reserves the longest sequence for each, as Transformers' `StaticCache` and the systems before PagedAttention do.

    Parameters
    ----------
    max_tokens : int
        Tokens reserved per sequence.
    """

    max_tokens: int = 524288

    def __post_init__(self) -> None:
        check_positive(self, "max_tokens")

    def open(
        self, shape: KVShape, capacity: int, device: torch.device | str | None = None, pinned: bool = False
    ) -> ContiguousPool:
        """See :meth:`Allocator.open`."""
        where = None if device is None else torch.device(device)
        return ContiguousPool(shape, open_arena(capacity, where, pinned), self.max_tokens)
