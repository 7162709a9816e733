"""The arithmetic over offloaded keys and values, in plain torch.

One context row of one layer at a time: ``kv`` is ``[kv_heads, n, 2, head_dim]`` on the host, keys at ``[:, :, 0]``;
``q`` is ``[kv_heads, group, head_dim]`` float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from alaya_hf.kernels.partial import Partial, merge

# Tokens brought to float32 at a time: bounds the working memory of a low-precision store.
BLOCK = 16384


def logits_of(scores: Tensor, scaling: float, softcap: float | None) -> Tensor:
    """Logits from unscaled scores, with the tanh cap of Gemma 2 where the model has one."""
    logits = scores * scaling
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def scan_scores(q: Tensor, kv: Tensor) -> Tensor:
    """Exact scores of every key: ``[kv_heads, group, n]`` float32."""
    n = kv.shape[1]
    scores = torch.empty(*q.shape[:2], n, dtype=torch.float32)
    for start in range(0, n, BLOCK):
        keys = kv[:, start : start + BLOCK, 0].float()
        scores[:, :, start : start + BLOCK] = q @ keys.transpose(1, 2)
    return scores


def select_threshold(scores: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens whose score reaches the head's threshold, united over the group.

    Parameters
    ----------
    scores : Tensor
        ``[kv_heads, group, n]`` float32.
    threshold : Tensor
        ``[kv_heads, group]`` float32.

    Returns
    -------
    ids, offsets, mask
        As in :class:`alaya_hf.index.Hits`.
    """
    selected = scores >= threshold.unsqueeze(-1)
    heads, ids = selected.any(dim=1).nonzero(as_tuple=True)
    counts = torch.bincount(heads, minlength=scores.shape[0])
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return ids.to(torch.int32), offsets, selected[heads, :, ids].T.to(torch.uint8).contiguous()


def dense_attention(q: Tensor, kv: Tensor, scaling: float, softcap: float | None = None) -> Partial:
    """Exact attention to all ``n`` tokens, in blocks.

    Returns
    -------
    Partial
        ``out`` ``[kv_heads, group, head_dim]``, ``lse`` ``[kv_heads, group]``.
    """
    parts = [Partial.empty(q.shape[:2], kv.shape[-1])]
    for start in range(0, kv.shape[1], BLOCK):
        block = kv[:, start : start + BLOCK].float()
        logits = logits_of(q @ block[:, :, 0].transpose(1, 2), scaling, softcap)
        lse = torch.logsumexp(logits, dim=-1)
        parts.append(Partial(torch.exp(logits - lse.unsqueeze(-1)) @ block[:, :, 1], lse))
    return merge(parts)


def gather_attention(
    q: Tensor,
    kv: Tensor,
    ids: Tensor,
    offsets: Tensor,
    scaling: float,
    mask: Tensor | None = None,
    softcap: float | None = None,
) -> Partial:
    """Exact attention to chosen tokens.

    Parameters
    ----------
    ids, offsets
        ``[total]`` int32 and ``[kv_heads + 1]`` int64: the tokens of each KV head.
    mask : Tensor, optional
        ``[group, total]`` uint8: which query head sees which token. Without it every head of the group sees all.
    """
    parts = []
    for head in range(q.shape[0]):
        begin, end = int(offsets[head]), int(offsets[head + 1])
        chosen = kv[head, ids[begin:end].long()].float()
        logits = logits_of(q[head] @ chosen[:, 0].T, scaling, softcap)
        if mask is not None:
            logits = logits.masked_fill(mask[:, begin:end] == 0, float("-inf"))
        lse = torch.logsumexp(logits, dim=-1) if end > begin else logits.new_full((q.shape[1],), float("-inf"))
        shift = torch.where(torch.isneginf(lse), torch.zeros_like(lse), lse)
        parts.append(Partial(torch.exp(logits - shift.unsqueeze(-1)) @ chosen[:, 1], lse))
    return Partial(torch.stack([part.out for part in parts]), torch.stack([part.lse for part in parts]))
