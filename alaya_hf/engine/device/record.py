"""What a probe keeps of a decode step of the device engine. Waits for the device."""

from __future__ import annotations

import torch
from torch import Tensor

from alaya_hf.engine.device.plan import DevicePlan
from alaya_hf.engine.device.tokens import DeviceTokens
from alaya_hf.kernels.gpu.step import Workspace
from alaya_hf.probes import Probe, StepRecord


def device_record(
    probe: Probe, q: Tensor, tokens: DeviceTokens, lows: list[int], work: Workspace, plan: DevicePlan, scaling: float
) -> StepRecord:
    """Summarise a step, and add its ids and counts to the probe.

    Parameters
    ----------
    probe : Probe
    q : Tensor
        ``[batch, heads, head_dim]``.
    tokens : DeviceTokens
        After the step.
    lows : list of int
        Tokens in the low-bit copy before it.
    work : Workspace
        As the step left it.
    plan : DevicePlan
    scaling : float

    Returns
    -------
    StepRecord
        Seconds are left to the caller.
    """
    counts, ids, fetched = work.counts.to("cpu"), work.ids.to("cpu").long(), work.fetched.to("cpu").sum(dim=2)
    listed = torch.arange(ids.shape[3]) < counts.unsqueeze(-1)
    ratios, watched, coverage = [], [], []
    for row, (count, low) in enumerate(zip(tokens.counts, lows, strict=True)):
        asked = torch.zeros(*counts.shape[1:], low + 1, dtype=torch.bool)
        asked = asked.scatter(2, ids[row].masked_fill(~listed[row], low), True)[..., :low]
        probe.ids += [head.nonzero().flatten() + tokens.init for head in asked.any(dim=1)]
        if plan.union:
            asked = asked.any(dim=1, keepdim=True).expand_as(asked)
        exact = torch.ones(*counts.shape[1:], count, dtype=torch.bool)
        exact[..., tokens.init : tokens.init + low] = asked
        if probe.recovery:
            keys, query = tokens.row(row)[0].float(), q[row].float().view(*counts.shape[1:], -1)
            logits = scaling * (query @ keys.transpose(1, 2)).to("cpu")
            part = logits.masked_fill(~exact, float("-inf")).logsumexp(dim=-1)
            ratios.append((part - logits.logsumexp(dim=-1)).exp().clamp(max=1.0).flatten())
        if probe.watch is not None and probe.watch.numel():
            seen = exact[..., probe.watch]
            watched.append(float(seen.float().mean()))
            coverage.append(float(seen.flatten(0, 1).any(dim=0).float().mean()))
    probe.head_counts.append(counts.float().flatten(1).mean(dim=0))
    # What the hot set did not have.
    over_bus = int(fetched.sum()) if tokens.hot is None else int((work.missed >= 0).sum())
    batch, recovery = len(lows), torch.stack(ratios).mean(dim=0) if ratios else None
    window = sum(count - low for count, low in zip(tokens.counts, lows, strict=True)) / batch
    return StepRecord(
        kind="decode",
        tokens=1,
        context=sum(tokens.counts) / batch,
        attended=window + float((fetched if plan.union else counts).float().mean()),
        retrieved=float(counts.float().mean()),
        fetched=float(fetched.float().mean()),
        touched=sum(lows) / batch,
        recovery=None if recovery is None else float(recovery.mean()),
        min_recovery=None if recovery is None else float(recovery.min()),
        watched=sum(watched) / batch if watched else None,
        watched_coverage=sum(coverage) / batch if coverage else None,
        bytes_moved=over_bus * tokens.form.row_bytes + batch * tokens.token_bytes,
        seconds=0.0,
    )
