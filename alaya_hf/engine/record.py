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
    union: bool,
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
    union : bool
        Whether query heads attend to their group's union.

    Returns
    -------
    StepRecord
        Bytes moved and seconds are left to the caller.
    """
    windows = torch.tensor(window.lengths, dtype=torch.float32)
    nothing = torch.zeros(len(windows), 1)
    retrieved = nothing if stats.retrieved is None else stats.retrieved
    fetched = nothing if stats.fetched is None else stats.fetched
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
    return StepRecord(
        kind="decode",
        tokens=tokens,
        context=sum(counts) / len(counts),
        attended=float(windows.mean() + (fetched if union else retrieved).mean()),
        retrieved=float(retrieved.mean()),
        fetched=float(fetched.mean()),
        touched=stats.touched / max(1, len(counts) * fetched.shape[1]),
        recovery=recovery,
        min_recovery=worst,
        bytes_moved=0,
        seconds=0.0,
    )
