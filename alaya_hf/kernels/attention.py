"""Exact attention with log-sum-exp over keys that lie on the device."""

from __future__ import annotations

import torch
from torch import Tensor

from alaya_hf.kernels.logits import logits_of
from alaya_hf.kernels.partial import Partial

# Logits held at a time by the plain implementation (elements).
LOGITS_BUDGET = 1 << 25


def _causal(q_len: int, n: int, start: int, stop: int, device: torch.device) -> Tensor:
    """Rows ``start:stop`` of the bottom-right aligned causal mask: ``[stop - start, n]``, true where visible."""
    rows = torch.arange(start, stop, device=device).unsqueeze(1) + (n - q_len)
    return torch.arange(n, device=device).unsqueeze(0) <= rows


def _plain(
    q: Tensor, k: Tensor, v: Tensor, scaling: float, causal: bool, mask: Tensor | None, softcap: float | None
) -> Partial:
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
            visible = _causal(q_len, n, start, start + count, q.device)
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


def _flash_cpu(q: Tensor, k: Tensor, v: Tensor, scaling: float, causal: bool, mask: Tensor | None) -> Partial:
    q_len, n = q.shape[2], k.shape[2]
    bias = None
    seen = None
    if mask is not None or (causal and q_len != n):
        visible = mask if mask is not None else torch.ones(1, 1, 1, n, dtype=torch.bool, device=q.device)
        if causal:
            visible = visible & _causal(q_len, n, 0, q_len, q.device)
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


def _flash_cuda(q: Tensor, k: Tensor, v: Tensor, scaling: float, causal: bool) -> Partial:
    group = q.shape[1] // k.shape[1]
    if group > 1:
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=scaling)
    return Partial(out.float(), lse.float())


def exact_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scaling: float,
    causal: bool = False,
    mask: Tensor | None = None,
    softcap: float | None = None,
) -> Partial:
    """Dense attention and its log-sum-exp, by the fastest implementation for the device.

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
    if softcap is None and q.device.type == "cpu":
        return _flash_cpu(q, k, v, scaling, causal, mask)
    if (
        softcap is None
        and mask is None
        and q.device.type == "cuda"
        and q.dtype in (torch.float16, torch.bfloat16)
        and q.shape[-1] <= 256
        and (not causal or q.shape[2] == k.shape[2])
    ):
        return _flash_cuda(q, k, v, scaling, causal)
    return _plain(q, k, v, scaling, causal, mask, softcap)


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
