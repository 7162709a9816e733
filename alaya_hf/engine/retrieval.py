"""The retrieved part of a step: attention to the critical offloaded tokens, where they lie."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from alaya_hf.engine.error import piece_error
from alaya_hf.engine.plan import Plan
from alaya_hf.index import Hits
from alaya_hf.kernels import host
from alaya_hf.kernels.partial import Partial, merge
from alaya_hf.storage import HostStore, Piece


@dataclass
class RetrievalStats:
    """What one step retrieved from one layer's store."""

    retrieved: Tensor | None = None  # [batch, heads] tokens asked for per query head
    fetched: Tensor | None = None  # [batch, kv_heads] tokens read
    attended: Tensor | None = None  # [batch, kv_heads] tokens attended exactly per query, mean over the group
    touched: int = 0
    bytes_read: int = 0
    ids: list[Tensor] = field(default_factory=list)  # per row and piece, positions in the store
    #: Per row and piece: row, positions in the store, their KV heads, and ``[group, q_len, total]`` who attended.
    found: list[tuple[int, Tensor, Tensor, Tensor]] = field(default_factory=list)
    everything: bool = False  # the query kept all
    everything_lse: Tensor | None = None  # [batch, heads, q_len] of all offloaded tokens, on request
    error: Tensor | None = None  # [batch, heads, q_len] estimated error of the output, in units of values, on request


def _search(q: Tensor, pieces: list[Piece], plan: Plan, best: Tensor, scaling: float, window_lse: Tensor) -> list[Hits]:
    hits = [
        piece.segment.searcher(plan.index).search(
            q, piece.kv if plan.index.reads_vectors else piece.view, plan.query, best, scaling, window_lse
        )
        for piece in pieces
    ]
    if len(hits) == 1 or not plan.query.cuts_segments:
        return hits
    # Each segment answered for itself; the cut over all of them is the same rule applied to what they found.
    for piece, found in zip(pieces, hits, strict=True):
        if found.scores is None:
            piece.segment.check(found.ids, found.offsets)
        found.with_scores(q, piece.view)
    together = torch.cat([found.as_rows() for found in hits], dim=2)
    threshold = plan.query.threshold_over_segments(together, best, scaling, window_lse)
    return [found.at_least(threshold) for found in hits]


def retrieve(
    q: Tensor,
    store: HostStore,
    plan: Plan,
    best: Tensor,
    window_lse: Tensor,
    scaling: float,
    group_mode: str = "union",
    softcap: float | None = None,
    probing: bool = False,
    want_everything_lse: bool = False,
    want_error: bool = False,
) -> tuple[Partial, Partial | None, RetrievalStats]:
    """Attend to the critical tokens of every row's offloaded context.

    Runs on the host, next to the data: queries travel to it and results back, keys and values stay.

    Parameters
    ----------
    q : Tensor
        ``[batch, heads, q_len, head_dim]`` on the layer's device. Every position may see every offloaded token.
    store : HostStore
    plan : Plan
    best, window_lse : Tensor
        ``[batch, heads, q_len]`` float32: highest score and log-sum-exp inside the window.
    scaling : float
    group_mode : {"union", "per_head"}
        See :class:`alaya_hf.AlayaConfig`. Positions of one pass share nothing: each attends to what its own group asked for,
        as if the tokens had come one by one.
    softcap : float, optional
        Cap on the logits; only with a query that keeps all.
    probing : bool
        Fill in the statistics.
    want_everything_lse : bool
        Also compute the log-sum-exp over all offloaded tokens, for the recovery ratio. Costs a dense pass.
    want_error : bool
        Also estimate the error of the output, see :mod:`alaya_hf.engine.error`.

    Returns
    -------
    retrieved : Partial
        ``[batch, heads, q_len]`` on the device of ``q``: the critical tokens, exactly.
    residual : Partial or None
        The same shape: the estimate of the tokens left out, if the plan has one.
    stats : RetrievalStats
    """
    batch, heads, q_len, head_dim = q.shape
    kv_heads = store.kv_heads
    stats = RetrievalStats(
        retrieved=torch.zeros(batch, heads, dtype=torch.float32),
        fetched=torch.zeros(batch, kv_heads),
        attended=torch.zeros(batch, kv_heads),
        everything=plan.query.keeps_all,
    )

    def folded(tensor: Tensor) -> Tensor:
        return tensor.to("cpu", torch.float32).reshape(batch, kv_heads, -1, *tensor.shape[3:])

    q_host, best_host, lse_host = folded(q), folded(best), folded(window_lse)
    rows, residuals, everything = [], [], []
    errors: list[Tensor] = []
    for row in range(batch):
        pieces = [piece for piece in store.rows[row] if piece.length]
        shape = q_host.shape[1:3]
        parts: list[Partial] = []
        residual: list[Partial] = []
        searched: list[tuple[Piece, Hits, Tensor | None, Tensor | None]] = []
        if plan.query.keeps_all:
            parts += [host.dense_attention(q_host[row], piece.kv, scaling, softcap) for piece in pieces]
            count = store.length(row)
            stats.retrieved[row] = stats.fetched[row] = stats.attended[row] = count  # type: ignore[index]
            stats.touched += kv_heads * count
            stats.ids.append(torch.arange(count, dtype=torch.int32).repeat(kv_heads))
        elif pieces and not (plan.query.keeps_none and plan.residual.is_none):
            for piece in pieces:
                # First, so that an index that reads the same low-bit copy finds it there.
                plan.residual.prepare(piece.segment)
            found = _search(q_host[row], pieces, plan, best_host[row], scaling, lse_host[row])
            start = 0
            for piece, hits in zip(pieces, found, strict=True):
                mask = _attendance(hits.mask, q_len) if group_mode == "union" else hits.mask
                if hits.ids.numel():
                    piece.segment.check(hits.ids, hits.offsets)
                    parts.append(host.gather_attention(q_host[row], piece.view, hits.ids, hits.offsets, scaling, mask))
                if probing:
                    _count(stats, row, hits, mask, heads, q_len, start)
                if not plan.residual.is_none:
                    residual.append(plan.residual.estimate(q_host[row], piece, hits, mask, scaling))
                if want_error:
                    searched.append((piece, hits, mask, None if plan.residual.is_none else residual[-1].lse))
                start += piece.length
        rows.append(merge(parts) if parts else Partial.empty(shape, head_dim))
        residuals.append(merge(residual) if residual else Partial.empty(shape, head_dim))
        if want_error:
            errors.append(_error(q_host[row], searched, plan, lse_host[row], rows[-1].lse, residuals[-1].lse, scaling))
        if want_everything_lse:
            dense = [host.dense_attention(q_host[row], piece.kv, scaling, softcap).lse for piece in pieces]
            everything.append(torch.logsumexp(torch.stack(dense), dim=0) if dense else torch.full(shape, float("-inf")))
    stats.bytes_read = int(stats.fetched.sum()) * 2 * head_dim * store.dtype.itemsize  # type: ignore[union-attr]
    if want_everything_lse:
        stats.everything_lse = torch.stack(everything).reshape(batch, heads, q_len)

    if want_error:
        stats.error = torch.stack(errors).reshape(batch, heads, q_len)

    def stacked(partials: list[Partial]) -> Partial:
        if len(partials) == 1:
            return partials[0].reshape(batch, heads, q_len).to(q.device)
        out = Partial(torch.stack([part.out for part in partials]), torch.stack([part.lse for part in partials]))
        return out.reshape(batch, heads, q_len).to(q.device)

    return stacked(rows), None if plan.residual.is_none else stacked(residuals), stats


def _error(
    q: Tensor, searched: list[tuple[Piece, Hits, Tensor | None, Tensor | None]], plan: Plan, window: Tensor, exact: Tensor,
    residual: Tensor, scaling: float,
) -> Tensor:  # fmt: skip
    """Estimated error of a row's output, ``[kv_heads, group]``; errors of its pieces are independent."""
    total = torch.logsumexp(torch.stack([window, exact, residual]), dim=0)
    squares = torch.zeros(q.shape[:2])
    for piece, hits, mask, left in searched:
        squares += piece_error(q, piece, hits, mask, plan.residual, left, total, scaling).square()
    return squares.sqrt()


def _attendance(mask: Tensor, q_len: int) -> Tensor | None:
    """Who attends to what where query heads share their group's union; None: everybody to everything.

    Parameters
    ----------
    mask : Tensor
        ``[group * q_len, total]`` uint8, who asked.
    """
    if q_len == 1:
        return None
    group = mask.shape[0] // q_len
    return mask.view(group, q_len, mask.shape[1]).amax(dim=0).repeat(group, 1)


def _count(
    stats: RetrievalStats, row: int, hits: Hits, mask: Tensor | None, heads: int, q_len: int, start: int
) -> None:
    assert stats.retrieved is not None and stats.fetched is not None and stats.attended is not None
    group = hits.mask.shape[0]
    kv_head, counts = hits.kv_head, hits.offsets[1:] - hits.offsets[:-1]
    per_head = torch.zeros(counts.numel(), group)
    per_head.index_add_(0, kv_head, hits.mask.T.float())
    stats.retrieved[row] += per_head.reshape(heads, q_len).mean(dim=1)
    stats.fetched[row] += counts.float()
    stats.touched += hits.touched
    ids = hits.ids + start
    stats.ids.append(ids)
    who = torch.ones_like(hits.mask) if mask is None else mask
    per_head = torch.zeros(counts.numel(), group)
    per_head.index_add_(0, kv_head, who.T.float())
    stats.attended[row] += per_head.mean(dim=1)
    stats.found.append((row, ids, kv_head, who.view(group // q_len, q_len, ids.numel())))
