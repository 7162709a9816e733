"""Exact attention and exact re-scoring of selected tokens, read in place from a host store."""

from __future__ import annotations

import numpy as np
import torch
from numba import njit, prange

from alaya_hf.kernels.cpu.numeric import FASTMATH, as_numpy, check_queries, check_store, flat_store, splits
from alaya_hf.kernels.cpu.tiles import TILE, attend, fill_rows, pad_queries, padded_group, tile_scores
from alaya_hf.kernels.partial import Partial

__all__ = [
    "check_selection",
    "gather_attention",
    "gather_attention_reference",
    "gather_scores",
    "gather_scores_reference",
]


def check_selection(kv: torch.Tensor, ids: torch.Tensor, offsets: torch.Tensor) -> None:
    """Raise ``ValueError`` unless `ids` and `offsets` describe one list of tokens of the store per KV head."""
    heads, tokens = kv.shape[:2]
    if ids.dtype != torch.int32 or ids.ndim != 1 or not ids.is_contiguous():
        raise ValueError(f"expected ids as a contiguous int32 vector, got {ids.dtype} {tuple(ids.shape)}")
    if offsets.dtype != torch.int64 or tuple(offsets.shape) != (heads + 1,):
        raise ValueError(f"expected int64 offsets of shape [{heads + 1}], got {offsets.dtype} {tuple(offsets.shape)}")
    bounds = offsets.tolist()
    if bounds[0] != 0 or bounds[-1] != ids.numel() or any(a > b for a, b in zip(bounds, bounds[1:], strict=False)):
        raise ValueError(f"expected offsets rising from 0 to {ids.numel()} (the number of ids), got {bounds}")
    if ids.numel():
        low, high = (int(x) for x in torch.aminmax(ids))
        if low < 0 or high >= tokens:
            raise ValueError(f"expected token ids within [0, {tokens}), got ids from {low} to {high}")


def gather_attention(
    q: torch.Tensor,
    kv: torch.Tensor,
    ids: torch.Tensor,
    offsets: torch.Tensor,
    scaling: float,
    mask: torch.Tensor | None = None,
) -> Partial:
    """Exact attention of every group to its own list of tokens.

    Parameters
    ----------
    q : Tensor ``[kv_heads, group, head_dim]`` float32
    kv : Tensor ``[kv_heads, tokens, 2, head_dim]`` float32, float16 or bfloat16
    ids : Tensor ``[total]`` int32
        Token ids; those of KV head `h` are ``ids[offsets[h]:offsets[h + 1]]``, in any order, each once.
    offsets : Tensor ``[kv_heads + 1]`` int64
    scaling : float
    mask : Tensor ``[group, total]`` uint8, optional
        1 where the query head sees the gathered token; ``None``: all see all.

    Returns
    -------
    Partial
        ``out`` ``[kv_heads, group, head_dim]`` and ``lse`` ``[kv_heads, group]``; empty for a head that sees no token.

    Raises
    ------
    ValueError
        Wrong shapes, dtypes or strides, or ids outside the store.

    Notes
    -----
    Cost: one scattered read of ``2 * head_dim`` elements per id, prefetched one tile ahead.
    """
    check_store(kv)
    check_queries(q, kv.shape[0], kv.shape[3])
    check_selection(kv, ids, offsets)
    heads, group = q.shape[:2]
    if mask is not None:
        if mask.dtype != torch.uint8 or tuple(mask.shape) != (group, ids.numel()):
            raise ValueError(f"expected a uint8 mask of shape [{group}, {ids.numel()}], got {mask.dtype} {mask.shape}")
        mask = mask.contiguous()
    store, stride = flat_store(kv)
    bounds = offsets.numpy()
    parts = splits(heads, ids.numel() // max(heads, 1), 128)
    flat_mask = None if mask is None else mask.view(-1).numpy()
    return Partial(
        *attend(q, store, stride, bounds[:-1].copy(), bounds[1:].copy(), parts, scaling, ids.numpy(), flat_mask)
    )


def gather_attention_reference(
    q: torch.Tensor,
    kv: torch.Tensor,
    ids: torch.Tensor,
    offsets: torch.Tensor,
    scaling: float,
    mask: torch.Tensor | None = None,
) -> Partial:
    """:func:`gather_attention` in plain torch, in the precision of `q`."""
    out, lse = torch.zeros_like(q), q.new_full(q.shape[:-1], float("-inf"))
    for h in range(kv.shape[0]):
        span = slice(int(offsets[h]), int(offsets[h + 1]))
        keys, values = kv[h, ids[span].long()].to(q.dtype).unbind(1)
        logits = q[h] @ keys.T * scaling
        if mask is not None:
            logits = logits.masked_fill(mask[:, span] == 0, float("-inf"))
        lse[h] = torch.logsumexp(logits, dim=-1)
        seen = ~torch.isneginf(lse[h])
        out[h, seen] = torch.softmax(logits[seen], dim=-1) @ values
    return Partial(out, lse)


@njit(fastmath=FASTMATH, cache=True, nogil=True, error_model="numpy")
def _gather_scores_range(q, q_at, group, d, store, head_at, ids, first, last, out, total):
    rows = group + 1 if group % 4 == 3 else group
    s = np.zeros(rows * TILE, np.float32)
    base = np.zeros(TILE, np.int64)
    ahead = np.zeros(TILE, np.int64)
    fill_rows(ahead, first, last, head_at, ids, True, d)
    i = first
    while i < last:
        count = min(TILE, last - i)
        base, ahead = ahead, base
        fill_rows(ahead, i + count, last, head_at, ids, True, d)
        tile_scores(s, q, q_at, group, d, store, base, count, ahead, 0)
        for g in range(group):
            at = g * total + i
            out[at : at + count] = s[g * TILE : g * TILE + count]
        i += count


@njit(parallel=True, fastmath=FASTMATH, cache=True, nogil=True, error_model="numpy")
def _gather_scores(q, group, rows, d, store, stride, ids, offsets, parts, out):
    heads = offsets.size - 1
    for task in prange(heads * parts):
        h = task // parts
        part = task % parts
        n = offsets[h + 1] - offsets[h]
        first = offsets[h] + n * part // parts
        last = offsets[h] + n * (part + 1) // parts
        _gather_scores_range(q, h * rows * d, group, d, store, h * stride, ids, first, last, out, ids.size)


def gather_scores(q: torch.Tensor, kv: torch.Tensor, ids: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Exact raw scores of every group with its own list of tokens: re-scoring of candidates.

    Parameters
    ----------
    q, kv, ids, offsets
        As in :func:`gather_attention`.

    Returns
    -------
    Tensor ``[group, total]`` float32
        Unscaled; column `i` belongs to ``ids[i]`` and the KV head whose range holds `i`.

    Raises
    ------
    ValueError
        Wrong shapes, dtypes or strides, or ids outside the store.
    """
    check_store(kv)
    check_queries(q, kv.shape[0], kv.shape[3])
    check_selection(kv, ids, offsets)
    heads, group, d = q.shape
    out = torch.empty(group, ids.numel(), dtype=torch.float32)
    if out.numel() and d:
        store, stride = flat_store(kv)
        _gather_scores(
            pad_queries(q), group, padded_group(group), d, store, stride, ids.numpy(), offsets.numpy(),
            splits(heads, ids.numel() // heads, 128), as_numpy(out.view(-1)),
        )  # fmt: skip
    return out


def gather_scores_reference(
    q: torch.Tensor, kv: torch.Tensor, ids: torch.Tensor, offsets: torch.Tensor
) -> torch.Tensor:
    """:func:`gather_scores` in plain torch, in the precision of `q`."""
    spans = [slice(int(a), int(b)) for a, b in zip(offsets, offsets[1:], strict=False)]
    columns = [q[h] @ kv[h, ids[span].long(), 0].to(q.dtype).T for h, span in enumerate(spans)]
    return torch.cat(columns, dim=1)
