"""What an index is: a way to find the offloaded tokens that a query asks for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from alaya_hf.query.base import Query


@dataclass
class Hits:
    """The critical tokens of one segment for one query per head.

    Attributes
    ----------
    ids : Tensor
        ``[total]`` int32, positions in the segment, ascending within each KV head: the union over the query heads that
        share it.
    offsets : Tensor
        ``[kv_heads + 1]`` int64, where each KV head's ids begin.
    mask : Tensor
        ``[group, total]`` uint8, which query head of the group asked for which id.
    scores : Tensor
        ``[group, total]`` float32, exact scores of the ids for every query head of the group.
    touched : int
        Keys whose score was computed, exactly or approximately, summed over KV heads.
    """

    ids: Tensor
    offsets: Tensor
    mask: Tensor
    scores: Tensor
    touched: int = 0

    @property
    def kv_head(self) -> Tensor:
        """``[total]`` int64, the KV head of each id."""
        counts = self.offsets[1:] - self.offsets[:-1]
        return torch.repeat_interleave(torch.arange(counts.numel()), counts)

    def keep(self, mask: Tensor) -> Hits:
        """Restrict to ``mask`` (``[group, total]``) and drop ids that no head asks for any more."""
        kept = mask.any(dim=0)
        counts = torch.zeros(self.offsets.numel() - 1, dtype=torch.int64)
        counts.index_add_(0, self.kv_head[kept], torch.ones(int(kept.sum()), dtype=torch.int64))
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        return Hits(self.ids[kept], offsets, mask[:, kept].to(torch.uint8), self.scores[:, kept], self.touched)


class Searcher(ABC):
    """The state of an index over one segment of one layer."""

    num_tokens: int = 0

    @abstractmethod
    def extend(self, kv: Tensor, queries: Tensor | None = None) -> None:
        """Index further tokens.

        Parameters
        ----------
        kv : Tensor
            ``[kv_heads, m, 2, head_dim]`` on the host, the tokens that follow those indexed so far.
        queries : Tensor, optional
            ``[kv_heads, s, head_dim]`` float32, query vectors sampled during prefill.
        """

    @abstractmethod
    def search(
        self, q: Tensor, kv: Tensor, query: Query, best: Tensor, scaling: float, window_lse: Tensor
    ) -> Hits:
        """Find the critical tokens among the first ``n`` of the segment.

        Parameters
        ----------
        q : Tensor
            ``[kv_heads, group, head_dim]`` float32.
        kv : Tensor
            ``[kv_heads, n, 2, head_dim]``: the searched prefix of the segment, ``n <= num_tokens``.
        query : Query
            The rule.
        best, scaling, window_lse
            See :meth:`Query.threshold`.
        """

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes the index holds besides the keys and values themselves."""


class Index(ABC):
    """Parameters of an index: a frozen dataclass registered by name."""

    kind: str

    @abstractmethod
    def open(self, kv_heads: int, head_dim: int) -> Searcher:
        """An empty searcher for one segment."""
