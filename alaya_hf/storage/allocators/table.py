"""Where sequences lie, as kernels read it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alaya_hf.storage.allocators.base import KVPool


@dataclass(frozen=True)
class BlockTable:
    """Sequences of a pool in one layer.

    Attributes
    ----------
    pool : Tensor
        ``[n]`` in the pool's dtype: the memory that `offsets` count from, which other rows lie before and behind.
    offsets : Tensor
        ``[sequences, blocks]`` int64 on the host: elements to the first row of each block; 0 beyond a sequence's end.
    block : int
        Tokens of a block; 0: every sequence is one run.
    """

    pool: Tensor
    offsets: Tensor
    block: int


def block_table(pool: KVPool[Any], sequences: Sequence[int], layer: int) -> BlockTable:
    """The table of a layer's rows, valid until the next operation on one of the sequences.

    Parameters
    ----------
    pool : KVPool
        Of any allocator, with memory.
    sequences : sequence of int
        At least one with a token.
    layer : int

    Raises
    ------
    UnavailableError
        If the pool only keeps accounts.
    UnknownSequenceError

    Notes
    -----
    Linear in the blocks of the sequences. Nothing is copied.
    """
    runs = [pool.token_runs(sequence, layer) for sequence in sequences]
    block = 0 if max(map(len, runs)) <= 1 else int(getattr(pool, "block"))  # noqa: B009  (pools of blocks have it)
    row = pool.shape.row_bytes
    starts = []
    for found in runs:
        parts = [run.offset + row * np.arange(0, run.tokens, block or max(1, run.tokens)) for run in found]
        starts.append(np.concatenate(parts) if parts else np.zeros(0, np.int64))
    first = next(int(start[0]) for start in starts if len(start))
    offsets = np.zeros((len(starts), max(map(len, starts))), np.int64)
    for line, start in zip(offsets, starts, strict=True):
        line[: len(start)] = (start - first) // pool.shape.dtype.itemsize
    return BlockTable(pool.arena.view(first, row).view(pool.shape.dtype), torch.from_numpy(offsets), block)
