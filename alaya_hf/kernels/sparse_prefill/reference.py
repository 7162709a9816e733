"""Tile-skipping attention in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from alaya_hf.kernels.partial import Partial
from alaya_hf.kernels.sparse_prefill.tiles import (
    K_TILE,
    Q_TILE,
    SparsePartial,
    TileRule,
    off_diagonal,
    span,
    tile_counts,
)


def sparse_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rule: TileRule | None,
    scaling: float,
    causal: bool,
    top: Tensor | None,
    with_map: bool,
) -> SparsePartial:
    """See :func:`~alaya_hf.kernels.sparse_prefill.sparse_attention`.

    Notes
    -----
    Serves every device and precision. Cost: as dense attention in float32, skipped tiles included; the scores of one
    query tile and KV head at a time. A skipped tile cannot raise a row's running maximum (limits are at most 0), so the
    running maximum before each tile is a cumulative maximum over all of them.
    """
    batch, heads, m, dim = q.shape
    kv_heads, n = k.shape[1], k.shape[2]
    group = heads // kv_heads
    rows, columns = tile_counts(m, n)
    if rule is None:
        rule = TileRule(torch.full((heads, rows), float("-inf"), device=q.device))
    partial = Partial.empty((batch, heads, m), v.shape[-1], q.device)
    skipped = torch.zeros(batch, heads, rows, dtype=torch.int32, device=q.device)
    record = torch.zeros(batch, heads, rows, columns, dtype=torch.uint8, device=q.device) if with_map else None
    for row in range(batch):
        for kv_head in range(kv_heads):
            mine = slice(kv_head * group, (kv_head + 1) * group)
            keys, values = k[row, kv_head].float(), v[row, kv_head].float()
            for tile in range(rows):
                part = slice(tile * Q_TILE, min(m, (tile + 1) * Q_TILE))
                full, end = span(tile, m, n, causal)
                if end == 0:
                    continue
                seen = min(n, end * K_TILE)
                queries = q[row, mine, part].float()
                count = queries.shape[1]
                scores = (queries.reshape(-1, dim) @ keys[:seen].T).view(group, count, seen)
                if causal:
                    # [count, diagonal keys]: what lies after the query.
                    places = torch.arange(full * K_TILE, seen, device=q.device)
                    last = torch.arange(part.start, part.stop, device=q.device) + (n - m)
                    scores[:, :, full * K_TILE :].masked_fill_(places > last[:, None], float("-inf"))
                diagonal = scores[:, :, full * K_TILE :]
                running = None if top is None else top[row, mine, part]
                if diagonal.shape[2]:
                    best = diagonal.amax(dim=2)
                    running = best if running is None else torch.maximum(running, best)
                if full:
                    off = functional.pad(
                        scores[:, :, : full * K_TILE], (0, max(0, full * K_TILE - seen)), value=float("-inf")
                    )
                    off = off.view(group, count, full, K_TILE).amax(dim=3)
                    limits = rule.limits[mine, tile]
                    below = _below(off, limits, running, rule.relative)
                    skipped[row, mine, tile] = below.sum(dim=1, dtype=torch.int32)
                    if record is not None:
                        record[row, mine, tile, :full] = below.to(torch.uint8)
                    gone = below.repeat_interleave(K_TILE, dim=1)[:, : min(seen, full * K_TILE)]
                    scores[:, :, : gone.shape[1]].masked_fill_(gone[:, None], float("-inf"))
                    best = off.amax(dim=2)
                    running = best if running is None else torch.maximum(running, best)
                if top is not None and running is not None:
                    top[row, mine, part] = running
                logits = scores.mul_(scaling)
                lse = torch.logsumexp(logits, dim=-1)
                shift = torch.where(torch.isneginf(lse), torch.zeros_like(lse), lse)
                weights = torch.exp(logits - shift.unsqueeze(-1))
                partial.out[row, mine, part] = (weights.view(-1, seen) @ values[:seen]).view(group, count, -1)
                partial.lse[row, mine, part] = lse
    return SparsePartial(partial, skipped, batch * heads * off_diagonal(m, n, causal), record)


def _below(maxima: Tensor, limits: Tensor, running: Tensor | None, relative: bool) -> Tensor:
    """Tiles to skip ``[group, tiles]`` from row maxima ``[group, count, tiles]`` and ``running`` ``[group, count]``."""
    if not relative:
        return maxima.amax(dim=1) < limits[:, None]
    first = torch.full_like(maxima[:, :, :1], float("-inf")) if running is None else running.unsqueeze(2)
    before = torch.cat([first, maxima[:, :, :-1]], dim=2).cummax(dim=2).values
    return (maxima < before + limits[:, None, None]).all(dim=1)
