"""How memory for keys and values is handed out: the published strategies behind one protocol."""

from alaya_hf.storage.allocators.base import Allocator, AllocatorStats, EvenRuns, Extents, KVPool, TokenRun
from alaya_hf.storage.allocators.contiguous import Contiguous
from alaya_hf.storage.allocators.dynamic import Dynamic
from alaya_hf.storage.allocators.paged import Paged
from alaya_hf.storage.allocators.segment import Segmented
from alaya_hf.storage.allocators.shape import KVShape
from alaya_hf.storage.allocators.table import BlockTable, block_table
from alaya_hf.storage.allocators.virtual import Virtual

__all__ = [
    "Allocator",
    "AllocatorStats",
    "BlockTable",
    "Contiguous",
    "Dynamic",
    "EvenRuns",
    "Extents",
    "KVPool",
    "KVShape",
    "Paged",
    "Segmented",
    "TokenRun",
    "Virtual",
    "block_table",
]
