"""Tile-skipping attention, by the kernel where there is a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from alaya_hf.kernels.sparse_prefill.reference import sparse_attention_reference
from alaya_hf.kernels.sparse_prefill.tiles import SparsePartial, TileRule, tile_counts


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rule: TileRule | None,
    scaling: float,
    causal: bool = False,
    top: Tensor | None = None,
    with_map: bool = False,
) -> SparsePartial:
    """Attention in tiles of 128 queries and 64 keys that leaves out the off-diagonal tiles a rule names.

    Every tile's scores are exact; a skipped tile costs no exponentials, no values and no second product, and its keys
    are missing from the denominator.

    Parameters
    ----------
    q : Tensor
        ``[batch, heads, m, head_dim]``.
    k, v : Tensor
        ``[batch, kv_heads, n, head_dim]`` on the same device; query head ``h`` reads KV head ``h // group``. No row may
        be padded.
    rule : TileRule or None
        None: nothing is skipped, dense attention by the same kernel.
    scaling : float
        Factor from scores to logits, positive.
    causal : bool
        Bottom-right aligned: the last query sees all keys. Otherwise every query sees every key, as a chunk sees its
        prefix.
    top : Tensor, optional
        ``[batch, heads, m]`` float32, contiguous: each query's largest score so far, ``-inf`` at first. Read and raised
        by relative rules, so that a context may come in blocks. Required for those.
    with_map : bool
        Also say which tiles were skipped: 1 byte a tile.

    Returns
    -------
    SparsePartial
        Merges with the partials of other keys.

    Raises
    ------
    ValueError
        If shapes do not fit.

    Notes
    -----
    Tiles are counted from the first query and the first key given. Diagonal tiles come first, then the others from left
    to right: the tiles that hold a query's neighbours and the first tokens, which usually have its largest scores, are
    seen before any relative rule has to decide. FlashAttention's order is left to right only; a rule's guarantee holds
    in any order. CUDA tensors in float16 or bfloat16, with a head dimension of up to 256 that is a multiple of 8, go to
    the Triton kernel, all others to plain torch, where skipping saves no time.
    """
    heads, kv_heads = q.shape[1], k.shape[1]
    wanted = (heads, tile_counts(q.shape[2], k.shape[2])[0])
    if k.shape != v.shape or heads % kv_heads or k.shape[::3] != q.shape[::3] or scaling <= 0:
        raise ValueError(
            "expected q [batch, heads, m, head_dim], k and v [batch, kv_heads, n, head_dim] and a positive scaling, got "
            f"{list(q.shape)}, {list(k.shape)}, {list(v.shape)} and {scaling}"
        )
    limits = None if rule is None else rule.limits
    if limits is not None and (limits.shape != wanted or limits.dtype != torch.float32 or limits.device != q.device):
        raise ValueError(
            f"expected limits {list(wanted)} float32 on {q.device}, got {list(limits.shape)} {limits.dtype} on "
            f"{limits.device}"
        )
    relative = rule is not None and rule.relative
    if relative and (top is None or top.shape != q.shape[:3] or top.dtype != torch.float32):
        raise ValueError(
            f"a relative rule needs top {list(q.shape[:3])} float32, got {None if top is None else top.shape}"
        )
    if not relative:
        top = None
    half = q.dtype == k.dtype == v.dtype and q.dtype in (torch.float16, torch.bfloat16)
    if q.device.type == "cuda" and half and q.shape[3] <= 256 and q.shape[3] % 8 == 0 and k.shape[2]:
        from alaya_hf.kernels.sparse_prefill.kernel import sparse_attention_kernel

        return sparse_attention_kernel(q, k, v, rule, scaling, causal, top, with_map)
    return sparse_attention_reference(q, k, v, rule, scaling, causal, top, with_map)
