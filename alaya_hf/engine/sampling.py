"""Query vectors for building indexes."""

from __future__ import annotations

import torch
from torch import Tensor


def sample_queries(query: Tensor, kv_heads: int, ratio: float, valid: Tensor | None) -> list[Tensor]:
    """Sample the queries of a prefill pass evenly over positions and over the query heads of each group.

    One index serves a whole group, so its samples come from all of the group's heads (AlayaDB, arXiv 2504.10326, section
    6.3).

    Parameters
    ----------
    query : Tensor
        ``[batch, heads, m, head_dim]``.
    kv_heads : int
    ratio : float
        Samples per token and KV head, in (0, 1].
    valid : Tensor or None
        ``[batch, m]`` bool, false where padding.

    Returns
    -------
    list of Tensor
        Per row ``[kv_heads, s, head_dim]`` float32 on the host.
    """
    batch, heads, tokens, head_dim = query.shape
    group = heads // kv_heads
    grouped = query.view(batch, kv_heads, group, tokens, head_dim)
    samples = []
    for row in range(batch):
        places = torch.arange(tokens) if valid is None else valid[row].nonzero().flatten()
        count = int(len(places) * ratio)
        chosen = places[torch.linspace(0, max(0, len(places) - 1), count).round().long()]
        members = torch.arange(count) % group
        taken = grouped[row][:, members.to(query.device), chosen.to(query.device)]
        samples.append(taken.to("cpu", torch.float32))
    return samples
