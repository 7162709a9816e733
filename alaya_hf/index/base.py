"""What an index is: a way to find the offloaded tokens that a query asks for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from alaya_hf.kernels import host
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
    scores : Tensor or None
        ``[group, total]`` float32, scores of the ids for every query head of the group, where the search computed them
        anyway; :meth:`with_scores` computes them otherwise.
    touched : int
        Keys whose score was computed, exactly or approximately, summed over KV heads.
    all_scores : Tensor or None
        ``[kv_heads, group, n]`` float32, scores of every token where the index computed them (exact or approximate); the
        residual reuses them. May be overwritten by its first reader.
    """

    ids: Tensor
    offsets: Tensor
    mask: Tensor
    scores: Tensor | None = None
    touched: int = 0
    all_scores: Tensor | None = None

    @property
    def kv_head(self) -> Tensor:
        """``[total]`` int64, the KV head of each id."""
        counts = self.offsets[1:] - self.offsets[:-1]
        return torch.repeat_interleave(torch.arange(counts.numel()), counts)

    def with_scores(self, q: Tensor, kv: Tensor) -> Hits:
        """Exact scores, if there are none yet."""
        if self.scores is None:
            self.scores = host.gather_scores(q, kv, self.ids, self.offsets)
        return self

    def as_rows(self) -> Tensor:
        """Scores as ``[kv_heads, group, longest]``, ``-inf`` where a head did not ask."""
        assert self.scores is not None
        counts = self.offsets[1:] - self.offsets[:-1]
        width = int(counts.max()) if counts.numel() else 0
        rows = self.scores.new_full((counts.numel(), self.scores.shape[0], width), float("-inf"))
        column = torch.arange(self.ids.numel()) - torch.repeat_interleave(self.offsets[:-1], counts)
        rows[self.kv_head, :, column] = self.scores.masked_fill(self.mask == 0, float("-inf")).T
        return rows

    def cut(self, query: Query, best: Tensor, scaling: float, window_lse: Tensor) -> Hits:
        """Apply a query's rule to the scores of these hits."""
        return self.at_least(query.threshold(self.as_rows(), best, scaling, window_lse))

    def at_least(self, threshold: Tensor) -> Hits:
        """Drop what does not reach ``threshold`` (``[kv_heads, group]``)."""
        assert self.scores is not None
        return self.keep((self.mask != 0) & (self.scores >= threshold[self.kv_head].T))

    def keep(self, mask: Tensor) -> Hits:
        """Restrict to ``mask`` (``[group, total]``) and drop ids that no head asks for any more."""
        kept = mask.any(dim=0)
        counts = torch.zeros(self.offsets.numel() - 1, dtype=torch.int64)
        counts.index_add_(0, self.kv_head[kept], torch.ones(int(kept.sum()), dtype=torch.int64))
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        scores = None if self.scores is None else self.scores[:, kept]
        return Hits(self.ids[kept], offsets, mask[:, kept].to(torch.uint8), scores, self.touched, self.all_scores)


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
    def search(self, q: Tensor, kv: Tensor, query: Query, best: Tensor, scaling: float, window_lse: Tensor) -> Hits:
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

    def state(self) -> dict[str, Tensor] | None:
        """What was built, as tensors to store beside the vectors; None: cannot be stored, build it again."""
        return None

    def restore(self, state: dict[str, Tensor], tokens: int) -> None:
        """Take over what :meth:`state` gave, for a segment that is not extended any more.

        Parameters
        ----------
        state : dict of Tensor
            May be mapped read-only; is read in place.
        tokens : int
            Tokens indexed.

        Raises
        ------
        ValueError
            If the tensors are not what :meth:`state` of ``tokens`` tokens would be.
        """
        raise NotImplementedError(f"{type(self).__name__} stores nothing.")

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes the index holds besides the keys and values themselves."""


class Index(ABC):
    """Parameters of an index: a frozen dataclass registered by name."""

    kind: str
    #: Whether a search scores every token, exactly or approximately.
    scores_all: ClassVar[bool] = False
    #: Whether a search reads the vectors of tokens that it does not return; a segment in a file is then verified whole.
    reads_vectors: ClassVar[bool] = False
    #: Whether a searcher keeps nothing of its own, so that it can be restored from nothing.
    stateless: ClassVar[bool] = False

    @property
    def sample_ratio(self) -> float:
        """Query vectors to sample during prefill, as a share of the number of keys; 0 for none."""
        return 0.0

    @abstractmethod
    def open(self, segment: Any) -> Searcher:
        """An empty searcher for a :class:`~alaya_hf.storage.Segment`."""

    def check(self, query: Query) -> None:  # noqa: B027  (most indexes answer every query)
        """Refuse queries that this index cannot answer.

        Raises
        ------
        ConfigError
        """
