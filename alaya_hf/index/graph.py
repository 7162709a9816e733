"""Graph search over the keys: RoarGraph, searched by DIPRS."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from alaya_hf.errors import ConfigError
from alaya_hf.index.base import Hits, Index, Searcher
from alaya_hf.index.roargraph import RoarGraph
from alaya_hf.kernels.state import expect_tensors
from alaya_hf.query.base import Query
from alaya_hf.query.dipr import DIPR
from alaya_hf.query.topk import TopK
from alaya_hf.registry import INDEXES


@INDEXES.register("graph")
@dataclass(frozen=True)
class Graph(Index):
    """One graph per KV head, built from query vectors sampled over its whole query group.

    Search time follows the number of critical tokens and hardly the context; building takes an exact nearest-neighbour
    pass over the sampled queries, so the graph pays where a context is asked often.

    Parameters
    ----------
    degree, knn, per_key, width, entry_points, route, l0, max_candidates, shared
        See :class:`~alaya_hf.index.roargraph.RoarGraph`.
    ef : int
        Width of the best-first search for :class:`~alaya_hf.TopK`; at least ``k`` is used.
    query_ratio : float
        Query vectors sampled during prefill per key; the paper's 0.4.
    slack : float
        DIPRS walks through keys within ``slack * beta`` of the best, at least 1, and returns those within ``beta``. A little
        slack crosses gaps between critical keys, for more keys touched.

    Notes
    -----
    Answers :class:`~alaya_hf.DIPR` (by DIPRS, AlayaDB section 6.1, algorithm 1) and :class:`~alaya_hf.TopK`.
    """

    degree: int = 24
    knn: int = 32
    per_key: int = 8
    width: int = 32
    entry_points: int = 0
    route: int = 24
    l0: int = 0
    max_candidates: int = 8192
    shared: bool = True
    ef: int = 128
    query_ratio: float = 0.4
    slack: float = 1.0

    # DIPRS walks over keys that are not critical.
    reads_vectors: ClassVar[bool] = True

    @property
    def sample_ratio(self) -> float:
        """``query_ratio``."""
        return self.query_ratio

    def __post_init__(self) -> None:
        try:
            self.build()
        except ValueError as error:
            raise ConfigError(f"index graph: {error}") from error
        if isinstance(self.ef, bool) or not isinstance(self.ef, int) or self.ef < 1:
            raise ConfigError(f"index.ef must be an integer of at least 1, but got {self.ef!r}.")
        if not 1 <= float(self.slack) <= 10:
            raise ConfigError(f"index.slack must be in [1, 10], but got {self.slack!r}.")

    def build(self) -> RoarGraph:
        """An empty graph with these parameters."""
        return RoarGraph(
            degree=self.degree,
            knn=self.knn,
            per_key=self.per_key,
            width=self.width,
            entry_points=self.entry_points,
            route=self.route,
            l0=self.l0,
            max_candidates=self.max_candidates,
            shared=self.shared,
            query_ratio=self.query_ratio,
        )

    def check(self, query: Query) -> None:
        """See :meth:`Index.check`."""
        if not isinstance(query, (DIPR, TopK)) and not query.keeps_all:
            raise ConfigError(
                f"the index 'graph' answers 'dipr' and 'topk', but the query is {query.kind!r}. Use the index 'flat' or "
                "'quantized'."
            )

    def open(self, segment: Any) -> GraphSearcher:
        """See :meth:`Index.open`."""
        return GraphSearcher(self, segment)


class GraphSearcher(Searcher):
    """A graph over one segment."""

    def __init__(self, index: Graph, segment: Any) -> None:
        self.index, self.segment = index, segment
        self._graph = index.build()

    def extend(self, kv: Tensor, queries: Tensor | None = None) -> None:
        """See :meth:`Searcher.extend`."""
        if self.num_tokens == 0:
            self._graph.build(kv, queries)
        else:
            self._graph.extend(self.segment.kv, kv.shape[1], queries)
        self.num_tokens += kv.shape[1]

    def state(self) -> dict[str, Tensor]:
        """Adjacency and entry points."""
        state = self._graph.state_dict()
        return {name: state[name] for name in ("adjacency", "entries")}

    def restore(self, state: dict[str, Tensor], tokens: int) -> None:
        """See :meth:`Searcher.restore`. Reads the adjacency once, to refuse ids outside the context."""
        adjacency, entries = expect_tensors(state, {"adjacency": torch.int32, "entries": torch.int32})
        self._graph = RoarGraph.from_state_dict(
            {**self._graph.state_dict(), "adjacency": adjacency, "entries": entries}
        )
        if tuple(adjacency.shape[:2]) != (self.segment.view.shape[0], tokens):
            raise ValueError(f"expected a graph of {tokens} tokens, but got adjacency {tuple(adjacency.shape)}.")
        self.num_tokens = tokens

    def search(self, q: Tensor, kv: Tensor, query: Query, best: Tensor, scaling: float, window_lse: Tensor) -> Hits:
        """See :meth:`Searcher.search`."""
        n = kv.shape[1]
        limit = n if n < self.num_tokens else None
        store = self.segment.kv
        kv_heads, group = q.shape[:2]
        if isinstance(query, DIPR):
            beta = query.range(scaling)
            found = self._graph.search(q, store, beta * self.index.slack, best, limit)
            hits = _united(found.ids, found.offsets, found.scores, kv_heads, group, n, int(found.touched.sum()))
            return hits if self.index.slack == 1 and query.cap is None else hits.cut(query, best, scaling, window_lse)
        assert isinstance(query, TopK)
        k = min(query.k, n)
        ids, scores, touched = self._graph.search_topk(q, store, k, max(k, self.index.ef), limit)
        kept = (ids >= 0).flatten()
        counts = (ids >= 0).sum(dim=-1).flatten()
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        return _united(ids.flatten()[kept], offsets, scores.flatten()[kept], kv_heads, group, n, int(touched.sum()))

    @property
    def nbytes(self) -> int:
        """Bytes of adjacency and entry points."""
        return self._graph.nbytes


def _united(ids: Tensor, offsets: Tensor, scores: Tensor, kv_heads: int, group: int, n: int, touched: int) -> Hits:
    """From one list per query head to the union per KV head."""
    lists = offsets.numpy()
    head = np.repeat(np.arange(kv_heads * group), np.diff(lists))
    keys, place = np.unique(head // group * n + ids.numpy().astype(np.int64), return_inverse=True)
    mask = np.zeros((group, keys.size), np.uint8)
    mask[head % group, place] = 1
    exact = np.zeros((group, keys.size), np.float32)
    exact[head % group, place] = scores.numpy()
    bounds = np.searchsorted(keys, np.arange(kv_heads + 1) * n)
    return Hits(
        ids=torch.from_numpy((keys % n).astype(np.int32)),
        offsets=torch.from_numpy(bounds.astype(np.int64)),
        mask=torch.from_numpy(mask),
        scores=torch.from_numpy(exact),
        touched=touched,
    )
