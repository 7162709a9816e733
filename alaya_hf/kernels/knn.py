"""Exact blocked inner-product nearest neighbours, on whatever device the keys are on."""

from __future__ import annotations

import torch

_SCORES_PER_BLOCK = 1 << 24  # scores held at once: 64 MB in float32
_RUN = 16  # scores per run in the two-step selection


def knn(queries: torch.Tensor, keys: torch.Tensor, k: int) -> torch.Tensor:
    """Return, for every query, the ids of the ``k`` keys with the largest inner products, largest first.

    The selection is exact and two-step: the ``k`` largest scores lie in the ``k`` runs with the largest maxima, so only
    those runs are ranked; a full ``topk`` over long rows costs more than the matrix product.

    Parameters
    ----------
    queries : Tensor ``[m, d]``, any floating dtype; moved to the keys' device.
    keys : Tensor ``[n, d]``, any floating dtype; need not be contiguous.
    k : int
        Neighbours per query; at most ``n`` are returned.

    Returns
    -------
    Tensor ``[m, min(k, n)]`` int32 on the keys' device.

    Notes
    -----
    Costs ``2 m n d`` operations in float32 and, besides a float32 copy of the keys, 64 MB for a block of scores.
    """
    n = keys.shape[0]
    k = min(k, n)
    ids = torch.empty(queries.shape[0], k, dtype=torch.int32, device=keys.device)
    if k == 0 or queries.shape[0] == 0:
        return ids
    transposed = keys.to(torch.float32).T.contiguous()
    runs = n // _RUN
    block = max(1, _SCORES_PER_BLOCK // n)
    for start in range(0, queries.shape[0], block):
        chunk = queries[start : start + block].to(device=keys.device, dtype=torch.float32)
        scores = chunk @ transposed
        if runs <= k:
            best = scores.topk(k, dim=1).indices
        else:
            maxima = scores[:, : runs * _RUN].unflatten(1, (runs, _RUN)).amax(-1)
            top = maxima.topk(k, dim=1, sorted=False).indices
            inside = torch.arange(_RUN, device=keys.device)
            tail = torch.arange(runs * _RUN, n, device=keys.device).expand(len(chunk), -1)
            candidates = torch.cat([(top[:, :, None] * _RUN + inside).flatten(1), tail], dim=1)
            best = candidates.gather(1, scores.gather(1, candidates).topk(k, dim=1).indices)
        ids[start : start + block] = best.to(torch.int32)
    return ids
