"""What a probe keeps of a decode step."""

from __future__ import annotations

import torch

from alaya_hf.engine.retrieval import RetrievalStats
from alaya_hf.kernels.partial import Partial, merge
from alaya_hf.probes import Probe, StepRecord
from alaya_hf.storage import Window


def decode_record(
    probe: Probe,
    tokens: int,
    counts: list[int],
    window: Window,
    exact: list[Partial],
    stats: RetrievalStats,
    heads: int,
) -> StepRecord:
    """Summarise a step, and add its ids and counts to the probe.

    Parameters
    ----------
    probe : Probe
    tokens : int
        New tokens of the pass.
    counts : list of int
        Tokens of each row.
    window : Window
    exact : list of Partial
        The window's partial, then the retrieved one if there is a store.
    stats : RetrievalStats
    heads : int
        Query heads.

    Returns
    -------
    StepRecord
        Bytes moved and seconds are left to the caller.
    """
    windows = torch.tensor(window.lengths, dtype=torch.float32)
    nothing = torch.zeros(len(windows), 1)
    retrieved = nothing if stats.retrieved is None else stats.retrieved
    fetched = nothing if stats.fetched is None else stats.fetched
    attended = nothing if stats.attended is None else stats.attended
    recovery = worst = None
    if probe.recovery:
        recovery, worst = 1.0, 1.0
        if stats.everything_lse is not None:
            everything = torch.logaddexp(exact[0].lse.to("cpu"), stats.everything_lse)
            ratio = torch.exp(merge(exact).lse.to("cpu") - everything).clamp(max=1.0)
            recovery, worst = float(ratio.mean()), float(ratio.mean(dim=(0, 2)).min())
    probe.ids.extend(ids + window.init for ids in stats.ids)
    if stats.retrieved is not None:
        probe.head_counts.append(stats.retrieved.mean(dim=0))
    watched, coverage = _watched(probe, tokens, counts, window, stats, heads)
    return StepRecord(
        kind="decode",
        tokens=tokens,
        context=sum(counts) / len(counts),
        attended=float(windows.mean() + attended.mean()),
        retrieved=float(retrieved.mean()),
        fetched=float(fetched.mean()),
        touched=stats.touched / max(1, len(counts) * fetched.shape[1]),
        recovery=recovery,
        min_recovery=worst,
        watched=watched,
        watched_coverage=coverage,
        bytes_moved=0,
        seconds=0.0,
    )


def _watched(
    probe: Probe, tokens: int, counts: list[int], window: Window, stats: RetrievalStats, heads: int
) -> tuple[float | None, float | None]:
    """Share of the watched tokens that were attended exactly: mean over heads, and by any head; mean over positions."""
    if probe.watch is None or not probe.watch.numel():
        return None, None
    watch = probe.watch
    by_head = torch.zeros(len(counts), heads, tokens)
    by_any = torch.zeros(len(counts), tokens, watch.numel(), dtype=torch.bool)
    for row, count in enumerate(counts):
        first = window.init_lengths[row]
        offloaded = count - window.lengths[row]
        near = (watch < first) | (watch >= first + offloaded)
        if stats.everything:
            near = torch.ones_like(near)
        by_any[row] = near
        by_head[row] = near.sum()
    for row, ids, kv_head, who in stats.found:
        positions = ids.long() + window.init_lengths[row]
        place = torch.searchsorted(watch, positions).clamp(max=watch.numel() - 1)
        hit = watch[place] == positions
        group = who.shape[0]
        kv_heads = heads // group
        per_head = torch.zeros(kv_heads, group, tokens)
        per_head.index_add_(0, kv_head[hit], who[:, :, hit].permute(2, 0, 1).float())
        by_head[row] += per_head.reshape(heads, tokens)
        for position in range(tokens):
            by_any[row, position, place[hit][who[:, position, hit].bool().any(dim=0)]] = True
    return float(by_head.mean()) / watch.numel(), float(by_any.float().mean())
