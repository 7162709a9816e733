"""Dense attention in plain torch, in float32: serves everything, everywhere."""

from __future__ import annotations

import torch
from torch import Tensor

from alaya_hf.kernels.exact.base import Backend, Request
from alaya_hf.kernels.logits import logits_of
from alaya_hf.kernels.partial import Partial

LOGITS_BUDGET = 1 << 25
"""Logits held at a time (elements)."""


def causal_mask(q_len: int, n: int, start: int, stop: int, device: torch.device) -> Tensor:
    """Rows ``start:stop`` of the bottom-right aligned causal mask: ``[stop - start, n]``, true where visible."""
    rows = torch.arange(start, stop, device=device).unsqueeze(1) + (n - q_len)
    return torch.arange(n, device=device).unsqueeze(0) <= rows


class Plain(Backend):
    """The reference: a softmax over float32 logits, some queries at a time."""

    name = "plain torch"

    def refuses(self, request: Request) -> str | None:
        """Never."""
        return None

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, scaling: float, causal: bool, mask: Tensor | None, softcap: float | None
    ) -> Partial:
        """Cost: float32 products and `LOGITS_BUDGET` logits at a time."""
        batch, heads, q_len, dim = q.shape
        kv_heads, n = k.shape[1], k.shape[2]
        group = heads // kv_heads
        keys, values = k.float(), v.float()
        step = max(1, LOGITS_BUDGET // max(1, batch * heads * n))
        outs, lses = [], []
        for start in range(0, q_len, step):
            rows = q[:, :, start : start + step].float()
            count = rows.shape[2]
            folded = rows.reshape(batch, kv_heads, group * count, dim)
            logits = logits_of(folded @ keys.transpose(2, 3), scaling, softcap).view(batch, kv_heads, group, count, n)
            if causal:
                visible = causal_mask(q_len, n, start, start + count, q.device)
                logits = logits.masked_fill(~visible, float("-inf"))
            if mask is not None:
                part = mask[:, :, start : start + count] if mask.shape[2] > 1 else mask
                logits = logits.masked_fill(~part.unsqueeze(2), float("-inf"))
            lse = torch.logsumexp(logits, dim=-1)
            # A query that sees nothing (padding) gets zeros, not nan.
            shift = torch.where(torch.isneginf(lse), torch.zeros_like(lse), lse)
            weights = torch.exp(logits - shift.unsqueeze(-1)).view(batch, kv_heads, group * count, n)
            outs.append((weights @ values).view(batch, heads, count, values.shape[-1]))
            lses.append(lse.view(batch, heads, count))
        return Partial(torch.cat(outs, dim=2), torch.cat(lses, dim=2))
