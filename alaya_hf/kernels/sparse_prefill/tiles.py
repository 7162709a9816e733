"""Tiles of the logits: their geometry, the rules that skip them, and their maxima."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from alaya_hf.kernels.partial import Partial

Q_TILE = 128
"""Queries of a tile."""
K_TILE = 64
"""Keys of a tile."""


@dataclass(frozen=True)
class TileRule:
    """Which off-diagonal tiles count for nothing.

    Attributes
    ----------
    limits : Tensor
        ``[heads, q_tiles]`` float32, in units of scores (logits over ``scaling``), on the device of the queries.
    relative : bool
        False (BSFA): a tile is skipped where its largest score is below its limit. True (BLASST): where in each of its
        rows the largest score is below that row's running maximum plus the limit, which is ``ln(lambda) / scaling``, at
        most 0.

    Notes
    -----
    With limits of ``-inf`` nothing is skipped. BSFA: arXiv 2512.07011. BLASST: arXiv 2512.12087, section 3; a skipped
    tile's weights are all below ``lambda`` times the largest weight of their row.
    """

    limits: Tensor
    relative: bool = False


@dataclass
class SparsePartial:
    """Attention over the tiles that were not skipped.

    Attributes
    ----------
    partial : Partial
        ``[batch, heads, m]``; the keys of skipped tiles are not in its log-sum-exp. Where all was skipped it is empty.
    skipped : Tensor
        ``[batch, heads, q_tiles]`` int32 on the device of the queries, tiles skipped.
    tiles : int
        Off-diagonal tiles, over all heads and rows: what `skipped` could add up to.
    map : Tensor or None
        ``[batch, heads, q_tiles, k_tiles]`` uint8, 1 where skipped, if it was asked for.
    """

    partial: Partial
    skipped: Tensor
    tiles: int
    map: Tensor | None = None


def tile_counts(m: int, n: int) -> tuple[int, int]:
    """Tiles of ``m`` queries and of ``n`` keys."""
    return -(-m // Q_TILE), -(-n // K_TILE)


def span(tile: int, m: int, n: int, causal: bool) -> tuple[int, int]:
    """Key tiles of a query tile: the first `full` are off-diagonal, those up to `end` on the diagonal.

    Off-diagonal means that every query of the tile sees all 64 keys. Without a causal mask all tiles are, also an
    incomplete last one. The mask is aligned bottom-right: query ``i`` of ``m`` sees the first ``n - m + i + 1`` keys.
    """
    if not causal:
        end = -(-n // K_TILE)
        return end, end
    first = max(0, n - m + tile * Q_TILE + 1)
    last = max(0, n - m + min(m, (tile + 1) * Q_TILE))
    return first // K_TILE, -(-last // K_TILE)


def off_diagonal(m: int, n: int, causal: bool) -> int:
    """Off-diagonal tiles of one head and row."""
    return sum(span(tile, m, n, causal)[0] for tile in range(tile_counts(m, n)[0]))


def tile_maxima(q: Tensor, k: Tensor, causal: bool = True) -> Tensor:
    """The largest score of every off-diagonal tile, which calibration looks at.

    Parameters
    ----------
    q : Tensor
        ``[batch, heads, m, head_dim]``.
    k : Tensor
        ``[batch, kv_heads, n, head_dim]``.
    causal : bool
        Bottom-right aligned.

    Returns
    -------
    Tensor
        ``[batch, heads, q_tiles, k_tiles]`` float32 scores, ``-inf`` for tiles that are not off-diagonal.

    Notes
    -----
    Cost: the products of dense attention in float32, a float32 copy of the keys, and the scores of one query tile of all
    heads at a time.
    """
    batch, heads, m, _ = q.shape
    kv_heads, n = k.shape[1], k.shape[2]
    rows, columns = tile_counts(m, n)
    keys = k.float().transpose(2, 3)
    maxima = torch.full((batch, heads, rows, columns), float("-inf"), dtype=torch.float32, device=q.device)
    for tile in range(rows):
        full = span(tile, m, n, causal)[0]
        if full:
            part = q[:, :, tile * Q_TILE : (tile + 1) * Q_TILE].float()
            scores = part.reshape(batch, kv_heads, -1, q.shape[3]) @ keys[..., : full * K_TILE]
            if scores.shape[-1] < full * K_TILE:
                scores = torch.nn.functional.pad(scores, (0, full * K_TILE - scores.shape[-1]), value=float("-inf"))
            best = scores.view(batch, heads, -1, full, K_TILE).amax(dim=(2, 4))
            maxima[:, :, tile, :full] = best
    return maxima
