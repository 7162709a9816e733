"""Exact scan of all keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from alaya_hf.index.base import Hits, Index, Searcher
from alaya_hf.kernels import host
from alaya_hf.query.base import Query
from alaya_hf.registry import INDEXES


@INDEXES.register("flat")
@dataclass(frozen=True)
class Flat(Index):
    """Score every key exactly. No state, no build; the reference every other index is measured against.

    Costs one read of all keys per step (``n * head_dim`` elements per KV head).
    """

    scores_all: ClassVar[bool] = True
    reads_vectors: ClassVar[bool] = True
    stateless: ClassVar[bool] = True

    def open(self, segment: object) -> FlatSearcher:
        """See :meth:`Index.open`."""
        return FlatSearcher()


class FlatSearcher(Searcher):
    """Nothing to build: only counts the tokens."""

    def extend(self, kv: Tensor, queries: Tensor | None = None) -> None:
        """See :meth:`Searcher.extend`."""
        self.num_tokens += kv.shape[1]

    def state(self) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def restore(self, state: dict[str, Tensor], tokens: int) -> None:
        """See :meth:`Searcher.restore`."""
        self.num_tokens = tokens

    def search(self, q: Tensor, kv: Tensor, query: Query, best: Tensor, scaling: float, window_lse: Tensor) -> Hits:
        """See :meth:`Searcher.search`."""
        scores = host.scan_scores(q, kv)
        threshold = query.threshold(scores, best, scaling, window_lse)
        ids, offsets, mask = host.select_threshold(scores, threshold)
        return Hits(ids, offsets, mask, touched=kv.shape[0] * kv.shape[1], all_scores=scores)

    @property
    def nbytes(self) -> int:
        """Zero."""
        return 0
