"""The arithmetic over offloaded keys and values: one context row of one layer at a time, on the CPU next to the data.

``kv`` is ``[kv_heads, n, 2, head_dim]`` on the host, keys at ``[:, :, 0]``; ``q`` is ``[kv_heads, group, head_dim]`` float32.
The numba kernels do the work; models that cap their logits (Gemma 2) take the plain torch path.
"""

from __future__ import annotations

import torch
from torch import Tensor

from alaya_hf.kernels.cpu import dense
from alaya_hf.kernels.cpu.blocks import block_mean_attention
from alaya_hf.kernels.cpu.dense import scan_scores
from alaya_hf.kernels.cpu.gather import gather_attention, gather_scores
from alaya_hf.kernels.cpu.leave_out import leave_out
from alaya_hf.kernels.cpu.lowbit_attend import lowbit_attention
from alaya_hf.kernels.cpu.lowbit_scan import lowbit_scores
from alaya_hf.kernels.cpu.select import select_threshold
from alaya_hf.kernels.cpu.sign import sign_scores
from alaya_hf.kernels.logits import logits_of
from alaya_hf.kernels.partial import Partial, merge

__all__ = [
    "block_mean_attention",
    "dense_attention",
    "gather_attention",
    "gather_scores",
    "leave_out",
    "lowbit_attention",
    "lowbit_scores",
    "scan_scores",
    "select_threshold",
    "sign_scores",
]

# Tokens brought to float32 at a time: bounds the working memory of a low-precision store.
BLOCK = 16384


def dense_attention(q: Tensor, kv: Tensor, scaling: float, softcap: float | None = None) -> Partial:
    """Exact attention to all ``n`` tokens.

    Parameters
    ----------
    q : Tensor
        ``[kv_heads, group, head_dim]`` float32.
    kv : Tensor
        ``[kv_heads, n, 2, head_dim]``.
    scaling : float
    softcap : float, optional
        Cap on the logits.

    Returns
    -------
    Partial
        ``out`` ``[kv_heads, group, head_dim]``, ``lse`` ``[kv_heads, group]``.
    """
    if softcap is None:
        return dense.dense_attention(q, kv, scaling)
    parts = [Partial.empty(q.shape[:2], kv.shape[-1])]
    for start in range(0, kv.shape[1], BLOCK):
        block = kv[:, start : start + BLOCK].float()
        logits = logits_of(q @ block[:, :, 0].transpose(1, 2), scaling, softcap)
        lse = torch.logsumexp(logits, dim=-1)
        parts.append(Partial(torch.exp(logits - lse.unsqueeze(-1)) @ block[:, :, 1], lse))
    return merge(parts)
