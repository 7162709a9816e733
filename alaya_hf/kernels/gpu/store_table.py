"""A store whose lines kernels find through a table of blocks."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from alaya_hf.kernels.gpu.op import check
from alaya_hf.kernels.gpu.store_format import StoreFormat


class StoreTable(NamedTuple):
    """Rows of a pool: all heads of a token side by side, tokens in blocks, or each row of the batch in one run.

    Attributes
    ----------
    rows : Tensor ``[n]``
        In the store's dtype (:class:`~alaya_hf.kernels.gpu.store_format.StoreFormat`): the memory that the table counts from.
    blocks : Tensor ``[batch, n]`` int64
        On the device: elements from the beginning of `rows` to the first line of each block, multiples of 8; -1 where a row of
        the batch has no block, to which nothing is written. Kernels read the table, so that a captured step stays valid when it
        changes.
    block_tokens : int
        Tokens of a block; 0: one run, without end.
    """

    rows: Tensor
    blocks: Tensor
    block_tokens: int


def table_format(rows: Tensor, blocks: Tensor, block_tokens: int, batch: int, head_dim: int) -> StoreFormat:
    """The format of the rows, checked: what :class:`StoreTable` promises.

    Raises
    ------
    ValueError
    """
    check(blocks, "blocks", (batch, None), torch.int64)
    if rows.dim() != 1 or not rows.is_contiguous() or block_tokens < 0:
        raise ValueError(
            f"expected a flat pool and blocks of at least 0 tokens, got {list(rows.shape)} {rows.dtype} and {block_tokens}"
        )
    return StoreFormat(head_dim, rows.dtype)


@triton.jit
def line_of(blocks, row, place, fits, block_count, heads, head, ROW: tl.constexpr, PAGE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where a place of a row lies, in elements, and whether it is one of `fits` that has a block."""
    which = place // PAGE if PAGE > 0 else place * 0
    within = place % PAGE if PAGE > 0 else place
    fits = fits & (which < block_count)
    start = tl.load(blocks + row * block_count + which, mask=fits, other=-1)
    return start + (within.to(tl.int64) * heads + head) * ROW, fits & (start >= 0)


__all__ = ["StoreTable", "line_of", "table_format"]
