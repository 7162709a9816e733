"""PagedAttention: fixed blocks anywhere, layer by layer."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

from alaya_hf.registry import ALLOCATORS
from alaya_hf.storage.allocators.arena import Arena
from alaya_hf.storage.allocators.blocked import BlockedAllocator, BlockedPool
from alaya_hf.storage.allocators.shape import KVShape


class PagedPool(BlockedPool):
    """``[layers, blocks, block, kv_heads, 2, head_dim]``; a sequence has the same blocks in all layers."""

    def __init__(self, shape: KVShape, arena: Arena, block: int) -> None:
        super().__init__(shape, arena, block)
        self._fresh = 0  # blocks from here on were never taken, and stand before the returned ones in the queue
        self._returned: deque[int] = deque()

    @property
    def layer_stride(self) -> int:
        """See :attr:`KVPool.layer_stride`."""
        return self.blocks * self.block * self.shape.row_bytes

    def _take(self, count: int, last: int | None) -> np.ndarray:
        fresh = min(count, self.blocks - self._fresh)
        blocks = list(range(self._fresh, self._fresh + fresh))
        self._fresh += fresh
        blocks += [self._returned.popleft() for _ in range(count - fresh)]
        return np.array(blocks, np.int64)

    def _give(self, blocks: np.ndarray) -> None:
        # Ends first, as vLLM does: heads of contexts are the likeliest to be asked for again.
        self._returned.extend(blocks[::-1].tolist())

    def _offsets(self, table: np.ndarray) -> np.ndarray:
        rows = self.block * self.shape.row_bytes
        return np.arange(self.shape.layers)[:, None] * (self.blocks * rows) + table * rows

    def _copy_block(self, source: int, target: int, tokens: int) -> None:
        for begin, end in self._offsets(np.array([source, target])).tolist():
            self._copy(begin, end, tokens * self.shape.row_bytes)

    def _free_runs(self) -> tuple[int, int]:
        idle = np.r_[0, self._references == 0, 0].astype(np.int8)
        runs = np.flatnonzero(np.diff(idle) == -1) - np.flatnonzero(np.diff(idle) == 1)
        return int(runs.sum()), int(runs.max(initial=0))


@ALLOCATORS.register("paged")
@dataclass(frozen=True)
class Paged(BlockedAllocator):
    """Block table, reference counts and copy-on-write of PagedAttention (arXiv 2309.06180, section 4).

    Free blocks form a queue, as in vLLM: the one that came back first goes out first, so that after a while neighbours in a
    sequence are no neighbours in memory. vLLM keeps keys and values apart, which doubles the number of its copies; here they
    are side by side as in every pool.

    Parameters
    ----------
    block : int
        Tokens per block.
    """

    pool = PagedPool
