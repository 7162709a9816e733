"""Exact attention with log-sum-exp over keys that lie on the device."""

from __future__ import annotations

import torch
from torch import Tensor

from alaya_hf.kernels.exact import attend
from alaya_hf.kernels.logits import logits_of
from alaya_hf.kernels.partial import Partial


def exact_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scaling: float,
    causal: bool = False,
    mask: Tensor | None = None,
    softcap: float | None = None,
) -> Partial:
    """Dense attention and its log-sum-exp, by the fastest implementation there is (:mod:`alaya_hf.kernels.exact`).

    Parameters
    ----------
    q : Tensor
        ``[batch, heads, q_len, head_dim]``.
    k, v : Tensor
        ``[batch, kv_heads, n, head_dim]`` on the same device; query head ``h`` reads KV head ``h // group``.
    scaling : float
        Factor from scores to logits.
    causal : bool
        The last query sees all keys, the one before it all but the last, and so on (bottom-right alignment).
    mask : Tensor, optional
        ``[batch, 1, 1 or q_len, n]`` bool, true where a key may be seen. Combined with ``causal``.
    softcap : float, optional
        Cap on the logits, ``softcap * tanh(logit / softcap)``.

    Returns
    -------
    Partial
        ``out`` ``[batch, heads, q_len, head_dim]`` float32, ``lse`` ``[batch, heads, q_len]`` float32.
    """
    if k.shape[2] == 0:
        return Partial.empty(q.shape[:3], v.shape[-1], q.device)
    return attend(q, k, v, scaling, causal, mask, softcap)


def window_attention(
    q: Tensor, k: Tensor, v: Tensor, scaling: float, mask: Tensor | None = None, softcap: float | None = None
) -> tuple[Partial, Tensor]:
    """Dense attention over a few tokens that also returns each query's best score.

    Parameters
    ----------
    q, k, v, scaling, softcap
        See :func:`exact_attention`.
    mask : Tensor, optional
        ``[batch, 1, 1 or q_len, n]`` bool, true where a key may be seen.

    Returns
    -------
    partial : Partial
        As :func:`exact_attention`.
    best : Tensor
        ``[batch, heads, q_len]`` float32, the highest unscaled score, ``-inf`` where nothing is seen.
    """
    batch, heads, q_len, dim = q.shape
    kv_heads, n = k.shape[1], k.shape[2]
    if n == 0:
        return Partial.empty(q.shape[:3], v.shape[-1], q.device), torch.full(
            q.shape[:3], float("-inf"), dtype=torch.float32, device=q.device
        )
    folded = q.float().reshape(batch, kv_heads, -1, dim)
    scores = (folded @ k.float().transpose(2, 3)).view(batch, heads, q_len, n)
    logits = logits_of(scores, scaling, softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
        logits = logits.masked_fill(~mask, float("-inf"))
    lse = torch.logsumexp(logits, dim=-1)
    shift = torch.where(torch.isneginf(lse), torch.zeros_like(lse), lse)
    weights = torch.exp(logits - shift.unsqueeze(-1)).reshape(batch, kv_heads, -1, n)
    out = (weights @ v.float()).view(batch, heads, q_len, v.shape[-1])
    return Partial(out, lse), scores.amax(dim=-1)
