"""Small pools of every allocator, and what stands behind their addresses."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from alaya_hf.storage.allocators import Contiguous, Dynamic, KVPool, KVShape, Paged, Segmented, Virtual
from alaya_hf.storage.allocators.host_pages import HostPages

PAGE, BLOCK, MOST = 4096, 4, 64
#: A row of 384 bytes: rows cross the borders of pages.
SHAPE = KVShape(layers=2, kv_heads=2, head_dim=24, dtype=torch.float32)
ALLOCATORS = {
    "contiguous": Contiguous(max_tokens=MOST),
    "dynamic": Dynamic(),
    "paged": Paged(block=BLOCK),
    "segment": Segmented(block=BLOCK),
    "virtual": Virtual(max_tokens=MOST, page=PAGE),
}
#: Of rows, pages and places alike.
UNIT = 128
CAPACITY = 6 * MOST * SHAPE.token_bytes
SHARING = ("paged", "segment", "virtual")


def rows_of(numbers: np.ndarray, layer: int) -> Tensor:
    """``[kv_heads, n, 2, head_dim]`` that spell the number of each token, the layer, the head and the side."""
    base = torch.from_numpy(numbers.astype(np.float32)).view(1, -1, 1, 1) * 16 + layer * 8
    heads = torch.arange(SHAPE.kv_heads).view(-1, 1, 1, 1) * 4
    sides = torch.arange(2).view(1, 1, 2, 1) * 2
    return (base + heads + sides).expand(-1, -1, -1, SHAPE.head_dim) + torch.arange(SHAPE.head_dim) / 32


def fill(pool: KVPool, sequence: int, start: int, numbers: np.ndarray) -> None:
    """Write tokens in all layers."""
    for layer in range(SHAPE.layers):
        pool.write(sequence, layer, start, rows_of(numbers, layer))


def read(pool: KVPool, sequence: int, layer: int) -> Tensor:
    """``[kv_heads, tokens, 2, head_dim]``, put together from what a reader sees."""
    parts = pool.rows(sequence, layer)
    return torch.cat(parts, 1) if parts else torch.empty(SHAPE.kv_heads, 0, 2, SHAPE.head_dim)


class Watched(HostPages):
    """Remembers which page is behind which address, as the system does."""

    def __init__(self, capacity: int, page: int) -> None:
        super().__init__(capacity, page)
        self.behind: dict[int, int] = {}

    def map(self, address, pages):
        super().map(address, pages)
        for i, page in enumerate(pages):
            assert address + i * self.page not in self.behind
            self.behind[address + i * self.page] = page

    def unmap(self, address, count):
        super().unmap(address, count)
        for i in range(count):
            del self.behind[address + i * self.page]


def physical(pool: KVPool, sequence: int) -> set[int]:
    """The units of `UNIT` bytes that a sequence's tokens lie in, by physical place."""
    found = set()
    for layer in range(SHAPE.layers):
        for offset, tokens in pool.token_runs(sequence, layer):
            places = range(offset, offset + tokens * SHAPE.row_bytes, UNIT)
            if isinstance(pool.arena, Watched):
                behind = pool.arena.behind
                found |= {behind[place // PAGE * PAGE] * PAGE + place % PAGE for place in places}
            else:
                found |= set(places)
    return found
