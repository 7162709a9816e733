"""A pass that skips tiles, row by row without padding."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from alaya_hf.engine.prefill.base import Chunk, PrefillPass
from alaya_hf.errors import UnsupportedModelError
from alaya_hf.kernels.partial import Partial
from alaya_hf.kernels.sparse_prefill import Q_TILE, TileRule, sparse_attention
from alaya_hf.storage import Window


class TilePass(PrefillPass):
    """Tile-skipping attention of one pass in one layer.

    Parameters
    ----------
    chunk : Chunk
    limits : callable
        From the positions of the query tiles' first tokens in their context (list of int) to limits ``[heads,
        q_tiles]`` float32 in scores.
    relative : bool
        See :class:`~alaya_hf.kernels.sparse_prefill.TileRule`.

    Raises
    ------
    UnsupportedModelError
        For capped logits.

    Notes
    -----
    A tile is 128 consecutive new tokens of a row, without its padding, by 64 consecutive earlier ones of one part of
    the context (new tokens, window, an offloaded block). Chunks and blocks that begin elsewhere cut other tiles and so
    skip a little differently. A tile shorter than that, at the end of a chunk, is a tile.
    """

    def __init__(self, chunk: Chunk, limits: Callable[[list[int]], Tensor], relative: bool) -> None:
        super().__init__(chunk)
        if chunk.softcap is not None:
            raise UnsupportedModelError(
                f"layer {chunk.layer_idx} caps its logits (softcap={chunk.softcap}), which a prefill that skips tiles does not "
                "serve. Use prefill='exact'."
            )
        batch, heads, m, _ = chunk.q.shape
        self._tokens: list[Tensor | None] = [None] * batch
        if chunk.valid is not None:
            self._tokens = [row.nonzero().flatten().to(chunk.q.device) for row in chunk.valid]
        self._queries, self._rules, self._tops = [], [], []
        for row, tokens in enumerate(self._tokens):
            queries = chunk.q[row : row + 1]
            if tokens is not None:
                queries = queries.index_select(2, tokens)
            places = [chunk.held[row] + start for start in range(0, queries.shape[2], Q_TILE)]
            rule = TileRule(limits(places).to(chunk.q.device, torch.float32), relative)
            shape = (1, heads, queries.shape[2])
            top = torch.full(shape, float("-inf"), dtype=torch.float32, device=chunk.q.device) if relative else None
            self._queries.append(queries)
            self._rules.append(rule)
            self._tops.append(top)
        self._skipped = torch.zeros((), dtype=torch.int64, device=chunk.q.device)

    def _attend(self, row: int, k: Tensor, v: Tensor, causal: bool) -> Partial:
        queries, tokens = self._queries[row], self._tokens[row]
        if queries.shape[2] == 0:
            return Partial.empty((1, *self.chunk.q.shape[1:3]), v.shape[-1], v.device)
        found = sparse_attention(queries, k, v, self._rules[row], self.chunk.scaling, causal, self._tops[row])
        self._skipped += found.skipped.sum()
        self.tiles += found.tiles
        if tokens is None:
            return found.partial
        total = Partial.empty((1, *self.chunk.q.shape[1:3]), v.shape[-1], v.device)
        total.out.index_copy_(2, tokens, found.partial.out)
        total.lse.index_copy_(2, tokens, found.partial.lse)
        return total

    def new(self, k: Tensor, v: Tensor) -> Partial:
        """See :meth:`PrefillPass.new`."""
        parts = []
        for row, tokens in enumerate(self._tokens):
            keys, values = k[row : row + 1], v[row : row + 1]
            if tokens is not None:
                keys, values = keys.index_select(2, tokens), values.index_select(2, tokens)
            parts.append(self._attend(row, keys, values, causal=True))
        return _joined(parts)

    def window(self, window: Window) -> Partial:
        """See :meth:`PrefillPass.window`."""
        rows = [window.row(row) for row in range(len(self._tokens))]
        return _joined([self.block(row, k[None], v[None]) for row, (k, v) in enumerate(rows)])

    def block(self, row: int, k: Tensor, v: Tensor) -> Partial:
        """See :meth:`PrefillPass.block`."""
        return self._attend(row, k, v, causal=False)

    def skipped(self) -> int:
        """See :meth:`PrefillPass.skipped`."""
        return int(self._skipped)


def _joined(parts: list[Partial]) -> Partial:
    if len(parts) == 1:
        return parts[0]
    return Partial(torch.cat([part.out for part in parts]), torch.cat([part.lse for part in parts]))
