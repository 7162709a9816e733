"""Torch's flash attention for CPUs."""

from __future__ import annotations

import torch
from torch import Tensor

from alaya_hf.kernels.exact.base import Backend, Request
from alaya_hf.kernels.exact.plain import causal_mask
from alaya_hf.kernels.partial import Partial


class TorchCPU(Backend):
    """``aten::_scaled_dot_product_flash_attention_for_cpu``, which returns the log-sum-exp and reads grouped KV heads."""

    name = "torch flash (CPU)"

    def refuses(self, request: Request) -> str | None:
        """Anything away from a CPU, and caps."""
        if request.device != "cpu":
            return "needs a CPU"
        return "takes no cap on the logits" if request.capped else None

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, scaling: float, causal: bool, mask: Tensor | None, softcap: float | None
    ) -> Partial:
        """Masks become a bias ``[batch, 1, q_len, n]``."""
        q_len, n = q.shape[2], k.shape[2]
        bias = None
        seen = None
        if mask is not None or (causal and q_len != n):
            visible = mask if mask is not None else torch.ones(1, 1, 1, n, dtype=torch.bool, device=q.device)
            if causal:
                visible = visible & causal_mask(q_len, n, 0, q_len, q.device)
            visible = visible.expand(q.shape[0], 1, q_len, n)
            seen = visible.any(dim=-1)
            bias = torch.zeros(visible.shape, dtype=q.dtype).masked_fill_(~visible, float("-inf"))
            causal = False
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, attn_mask=bias, scale=scaling
        )
        out, lse = out.float(), lse.float()
        if seen is not None:
            # The kernel returns a log-sum-exp of 0 for a row that sees nothing.
            lse = lse.masked_fill(~seen, float("-inf"))
            out = torch.where(seen.unsqueeze(-1), out, torch.zeros_like(out))
        return Partial(out, lse)
