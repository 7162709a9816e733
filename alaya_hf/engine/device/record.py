"""What a probe keeps of a decode pass of the device engine. Waits for the device."""

from __future__ import annotations

import torch
from torch import Tensor

from alaya_hf.engine.device.plan import DevicePlan
from alaya_hf.engine.device.selected import selected_tokens
from alaya_hf.engine.device.tokens import DeviceTokens
from alaya_hf.kernels.gpu.coarse_step import CoarseWorkspace
from alaya_hf.kernels.gpu.step import Workspace
from alaya_hf.probes import Probe, StepRecord


class DeviceRecord:
    """Summarises a pass, one share of its positions after the other.

    Parameters
    ----------
    probe : Probe
    q : Tensor
        ``[batch, heads, new, head_dim]``.
    tokens : DeviceTokens
        Before the pass.
    """

    def __init__(self, probe: Probe, q: Tensor, tokens: DeviceTokens) -> None:
        self.probe, self.q, self.lows = probe, q, list(tokens.lows)
        self.over_bus = 0
        # Per share of the positions, on the host: [batch, kv_heads, positions, group, ...], and [batch, kv_heads, positions].
        self.counts: list[Tensor] = []
        self.ids: list[Tensor] = []
        self.fetched: list[Tensor] = []

    def add(self, work: Workspace | CoarseWorkspace, first: int = 0) -> None:
        """Take over what the positions from `first` on selected, before others use the buffers."""
        shape = (work.batch, work.kv_heads, work.positions, work.group)
        counts, ids = selected_tokens(work, self.lows)
        self.counts.append(counts.view(shape))
        self.ids.append(ids.view(*shape, -1))
        fetched = work.fetched.to("cpu").view(*shape[:3], -1)
        self.fetched.append(fetched.sum(dim=3) if work.cap else torch.zeros(shape[:3], dtype=torch.int64))
        # What the hot set did not have.
        self.over_bus += int(self.fetched[-1].sum()) if work.hot is None else int((work.missed >= 0).sum())

    def finish(self, tokens: DeviceTokens, plan: DevicePlan, scaling: float) -> StepRecord:
        """The record; ids and counts go to the probe.

        Parameters
        ----------
        tokens : DeviceTokens
            After the pass.
        plan : DevicePlan
        scaling : float

        Returns
        -------
        StepRecord
            Seconds are left to the caller.
        """
        probe = self.probe
        counts, ids, fetched = (torch.cat(parts, dim=2) for parts in (self.counts, self.ids, self.fetched))
        batch, kv_heads, new, group = counts.shape
        listed = torch.arange(ids.shape[4]) < counts.unsqueeze(-1)
        ratios, watched, coverage = [], [], []
        for row, (count, low) in enumerate(zip(tokens.counts, self.lows, strict=True)):
            asked = torch.zeros(*counts.shape[1:], low + 1, dtype=torch.bool)
            asked = asked.scatter(3, ids[row].masked_fill(~listed[row], low), True)[..., :low]
            probe.ids += [found.nonzero().flatten() + tokens.init for found in asked.any(dim=2).flatten(0, 1)]
            if plan.union:
                asked = asked.any(dim=2, keepdim=True).expand_as(asked)
            # A position sees itself and what is before it.
            visible = torch.arange(count) <= torch.arange(count - new, count)[:, None]
            exact = visible[None, :, None].expand(kv_heads, new, group, count).clone()
            exact[..., tokens.init : tokens.init + low] = asked
            if probe.recovery:
                keys = tokens.row(row)[0].float()
                query = self.q[row].float().view(kv_heads, group, new, -1).transpose(1, 2).flatten(1, 2)
                logits = (scaling * (query @ keys.transpose(1, 2))).to("cpu").view(kv_heads, new, group, count)
                logits = logits.masked_fill(~visible[None, :, None], float("-inf"))
                part = logits.masked_fill(~exact, float("-inf")).logsumexp(dim=-1)
                ratios.append((part - logits.logsumexp(dim=-1)).exp().clamp(max=1.0).mean(dim=1).flatten())
            if probe.watch is not None and probe.watch.numel():
                seen = exact[..., probe.watch]
                watched.append(float(seen.float().mean()))
                coverage.append(float(seen.flatten(0, 2).any(dim=0).float().mean()))
        probe.head_counts.append(counts.float().mean(dim=2).flatten(1).mean(dim=0))
        recovery = torch.stack(ratios).mean(dim=0) if ratios else None
        later = (new - 1) / 2  # tokens that a position does not see yet, on average
        window = sum(count - low for count, low in zip(tokens.counts, self.lows, strict=True)) / batch - later
        return StepRecord(
            kind="decode",
            tokens=new,
            context=sum(tokens.counts) / batch - later,
            attended=window + float((fetched if plan.union else counts).float().mean()),
            retrieved=float(counts.float().mean()),
            fetched=float(fetched.float().mean()),
            touched=sum(tokens.layout.scored(low) for low in self.lows) / batch,
            recovery=None if recovery is None else float(recovery.mean()),
            min_recovery=None if recovery is None else float(recovery.min()),
            watched=sum(watched) / batch if watched else None,
            watched_coverage=sum(coverage) / batch if coverage else None,
            bytes_moved=self.over_bus * tokens.form.row_bytes + batch * new * tokens.token_bytes,
            seconds=0.0,
        )
