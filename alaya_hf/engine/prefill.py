"""Exact attention of many new tokens to themselves and to everything before them."""

from __future__ import annotations

import torch
from torch import Tensor

from alaya_hf.kernels.attention import exact_attention
from alaya_hf.kernels.partial import Partial, merge_into
from alaya_hf.storage import HostStore, Window


def attend_new(q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, scaling: float, softcap: float | None) -> Partial:
    """New tokens among themselves, causally.

    Parameters
    ----------
    q : Tensor
        ``[batch, heads, m, head_dim]``.
    k, v : Tensor
        ``[batch, kv_heads, m, head_dim]``.
    valid : Tensor or None
        ``[batch, m]`` bool on the host, false where padding. Queries there see nothing.
    """
    causal = q.shape[2] > 1
    if valid is None:
        return exact_attention(q, k, v, scaling, causal=causal, softcap=softcap)
    # Row by row without its padding: no mask, which the fastest implementations do not take.
    total = Partial.empty(q.shape[:3], v.shape[-1], q.device)
    for row in range(q.shape[0]):
        tokens = valid[row].nonzero().flatten().to(q.device)
        if tokens.numel():
            queries, keys, values = (x[row : row + 1].index_select(2, tokens) for x in (q, k, v))
            part = exact_attention(queries, keys, values, scaling, causal=causal, softcap=softcap)
            total.out[row].index_copy_(1, tokens, part.out[0])
            total.lse[row].index_copy_(1, tokens, part.lse[0])
    return total


def attend_window(q: Tensor, window: Window, scaling: float, softcap: float | None) -> Partial:
    """New tokens to the window that they follow."""
    keys, values, mask = window.view()
    mask = None if mask is None else mask[:, None, None, :]
    return exact_attention(q, keys, values, scaling, mask=mask, softcap=softcap)


def attend_store(q: Tensor, store: HostStore, block: int, scaling: float, softcap: float | None) -> tuple[Partial, int]:
    """New tokens to the offloaded context, which comes to the device block by block.

    Parameters
    ----------
    block : int
        Tokens on the device at a time.

    Returns
    -------
    partial : Partial
    bytes_moved : int
        Bytes of keys and values read from the store.
    """
    rows, moved = [], 0
    for row in range(q.shape[0]):
        query = q[row : row + 1]
        total = Partial.empty(query.shape[:3], q.shape[3], q.device)
        for piece in store.rows[row]:
            for start in range(0, piece.length, block):
                part = piece.segment.read(start, min(start + block, piece.length))
                moved += part.numel() * part.element_size()
                part = part.to(q.device, q.dtype).unsqueeze(0)
                merge_into(total, exact_attention(query, part[:, :, :, 0], part[:, :, :, 1], scaling, softcap=softcap))
        rows.append(total)
    return Partial(torch.cat([part.out for part in rows]), torch.cat([part.lse for part in rows])), moved
