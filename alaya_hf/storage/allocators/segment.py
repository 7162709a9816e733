"""FlowKV: all layers of a block together, blocks in as few runs as possible."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from alaya_hf.registry import ALLOCATORS
from alaya_hf.storage.allocators.arena import Arena
from alaya_hf.storage.allocators.blocked import BlockedAllocator, BlockedPool
from alaya_hf.storage.allocators.shape import KVShape
from alaya_hf.storage.runs import FreeRuns


class SegmentPool(BlockedPool):
    """``[blocks, layers, block, kv_heads, 2, head_dim]``."""

    def __init__(self, shape: KVShape, arena: Arena, block: int) -> None:
        super().__init__(shape, arena, block)
        self._free = FreeRuns()
        if self.blocks:
            self._free.add(0, self.blocks)

    @property
    def layer_stride(self) -> int:
        """See :attr:`KVPool.layer_stride`."""
        return self.block * self.shape.row_bytes

    @property
    def block_step(self) -> int:
        """See :attr:`KVPool.block_step`."""
        return self.block_bytes

    def _take(self, count: int, last: int | None) -> np.ndarray:
        pieces = []
        if last is not None:
            pieces.append((last + 1, self._free.take_at(last + 1, count)))
            count -= pieces[0][1]
        pieces += self._free.take_pieces(count)
        return np.concatenate([np.arange(start, start + size, dtype=np.int64) for start, size in pieces])

    def _give(self, blocks: np.ndarray) -> None:
        blocks = np.sort(blocks)
        if len(blocks):
            for run in np.split(blocks, np.flatnonzero(np.diff(blocks) != 1) + 1):
                self._free.give(int(run[0]), len(run))

    def _offsets(self, table: np.ndarray) -> np.ndarray:
        rows = self.block * self.shape.row_bytes
        return np.arange(self.shape.layers)[:, None] * rows + table * self.block_bytes

    def _copy_block(self, source: int, target: int, tokens: int) -> None:
        # The whole block in one copy: its layers lie together, the unfilled ends between them are cheaper than more copies.
        self._copy(source * self.block_bytes, target * self.block_bytes, self.block_bytes)

    def _free_runs(self) -> tuple[int, int]:
        return self._free.total, self._free.largest


@ALLOCATORS.register("segment")
@dataclass(frozen=True)
class Segmented(BlockedAllocator):
    """FlowKV's allocation (arXiv 2504.03775, section 3): best fit over free runs, neighbours joined on return.

    A sequence grows into the blocks behind its last one where they are free. Otherwise the smallest run that is large enough
    serves it, and if none is, the largest ones do. Reference counts and copy-on-write are those of `paged`.

    Parameters
    ----------
    block : int
        Tokens per block.
    """

    pool = SegmentPool
