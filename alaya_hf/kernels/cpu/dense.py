"""Dense decode attention and exact key scan over a host store."""

from __future__ import annotations

import numpy as np
import torch
from numba import njit, prange

from alaya_hf.kernels.cpu.numeric import FASTMATH, as_numpy, check_queries, check_store, flat_store, splits
from alaya_hf.kernels.cpu.tiles import TILE, attend, pad_queries, padded_group, tile_scores
from alaya_hf.kernels.partial import Partial

__all__ = ["dense_attention", "dense_attention_reference", "scan_scores", "scan_scores_reference"]


def _range(kv: torch.Tensor, start: int, stop: int | None) -> tuple[int, int]:
    tokens = kv.shape[1]
    end = tokens if stop is None else stop
    if not 0 <= start <= end <= tokens:
        raise ValueError(f"expected 0 <= start <= stop <= {tokens} (the tokens of the store), got [{start}, {end})")
    return start, end


def dense_attention(
    q: torch.Tensor, kv: torch.Tensor, scaling: float, start: int = 0, stop: int | None = None
) -> Partial:
    """Exact attention to the tokens ``[start, stop)`` of a host store.

    Parameters
    ----------
    q : Tensor ``[kv_heads, group, head_dim]`` float32
    kv : Tensor ``[kv_heads, tokens, 2, head_dim]`` float32, float16 or bfloat16
        Read in place; the stride between heads may exceed ``tokens * 2 * head_dim``.
    scaling : float
        Multiplies the scores.
    start, stop : int
        Token range; ``stop=None`` is the end.

    Returns
    -------
    Partial
        ``out`` ``[kv_heads, group, head_dim]`` and ``lse`` ``[kv_heads, group]``, float32.

    Raises
    ------
    ValueError
        Wrong shape, dtype, device or strides, or a range outside the store.

    Notes
    -----
    Cost: one read of the range; bound by memory bandwidth for groups up to about 8. Split-KV decoding (FlashDecoding):
    heads and token ranges run in parallel, each with an online softmax, merged by log-sum-exp.
    """
    check_store(kv)
    check_queries(q, kv.shape[0], kv.shape[3])
    start, stop = _range(kv, start, stop)
    heads = kv.shape[0]
    store, stride = flat_store(kv)
    lo = np.full(heads, start, np.int64)
    hi = np.full(heads, stop, np.int64)
    return Partial(*attend(q, store, stride, lo, hi, splits(heads, stop - start), scaling))


def dense_attention_reference(
    q: torch.Tensor, kv: torch.Tensor, scaling: float, start: int = 0, stop: int | None = None
) -> Partial:
    """:func:`dense_attention` in plain torch, in the precision of `q`."""
    keys, values = kv[:, start:stop].to(q.dtype).unbind(2)
    logits = q @ keys.transpose(-1, -2) * scaling
    if logits.shape[-1] == 0:
        return Partial(torch.zeros_like(q), q.new_full(q.shape[:-1], float("-inf")))
    return Partial(torch.softmax(logits, dim=-1) @ values, torch.logsumexp(logits, dim=-1))


@njit(fastmath=FASTMATH, cache=True, nogil=True, error_model="numpy")
def _scan_range(q, q_at, group, d, store, head_at, first, last, out, out_at, n, start):
    rows = group + 1 if group % 4 == 3 else group
    s = np.zeros(rows * TILE, np.float32)
    base = np.zeros(TILE, np.int64)
    ahead = np.zeros(TILE, np.int64)
    i = first
    while i < last:
        count = min(TILE, last - i)
        for t in range(count):
            base[t] = head_at + (i + t) * 2 * d
            ahead[t] = base[t] + TILE * 2 * d
        tile_scores(s, q, q_at, group, d, store, base, count, ahead, 0)
        for g in range(group):
            at = out_at + g * n + (i - start)
            out[at : at + count] = s[g * TILE : g * TILE + count]
        i += count


@njit(parallel=True, fastmath=FASTMATH, cache=True, nogil=True, error_model="numpy")
def _scan(q, heads, group, rows, d, store, stride, start, n, parts, out):
    for task in prange(heads * parts):
        h = task // parts
        part = task % parts
        first = start + n * part // parts
        last = start + n * (part + 1) // parts
        _scan_range(q, h * rows * d, group, d, store, h * stride, first, last, out, h * group * n, n, start)


def scan_scores(
    q: torch.Tensor, kv: torch.Tensor, start: int = 0, stop: int | None = None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Exact raw scores ``q . k`` of every key in ``[start, stop)``: the flat index.

    Parameters
    ----------
    q : Tensor ``[kv_heads, group, head_dim]`` float32
    kv : Tensor ``[kv_heads, tokens, 2, head_dim]`` float32, float16 or bfloat16
    start, stop : int
        Token range; ``stop=None`` is the end.
    out : Tensor ``[kv_heads, group, stop - start]`` float32, optional
        Contiguous; written to instead of a fresh tensor.

    Returns
    -------
    Tensor ``[kv_heads, group, stop - start]`` float32
        Unscaled inner products; column ``j`` is token ``start + j``.

    Raises
    ------
    ValueError
        Wrong shape, dtype, device or strides, or a range outside the store.

    Notes
    -----
    Cost: one read of the keys in the range.
    """
    check_store(kv)
    check_queries(q, kv.shape[0], kv.shape[3])
    start, stop = _range(kv, start, stop)
    heads, group, d = q.shape
    n = stop - start
    out = score_buffer(out, (heads, group, n))
    if out.numel() and d:
        store, stride = flat_store(kv)
        rows = padded_group(group)
        _scan(pad_queries(q), heads, group, rows, d, store, stride, start, n, splits(heads, n), as_numpy(out.view(-1)))
    return out


def score_buffer(out: torch.Tensor | None, shape: tuple[int, ...]) -> torch.Tensor:
    """`out` after a check, or a fresh float32 tensor of this shape."""
    if out is None:
        return torch.empty(shape, dtype=torch.float32)
    if tuple(out.shape) != shape or out.dtype != torch.float32 or not out.is_contiguous():
        raise ValueError(
            f"expected out to be a contiguous float32 tensor of shape {shape}, got {out.dtype} {tuple(out.shape)}"
        )
    return out


def scan_scores_reference(
    q: torch.Tensor, kv: torch.Tensor, start: int = 0, stop: int | None = None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """:func:`scan_scores` in plain torch, in the precision of `q`."""
    scores = q @ kv[:, start:stop, 0].to(q.dtype).transpose(-1, -2)
    return scores if out is None else out.copy_(scores)
