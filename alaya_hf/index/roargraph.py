"""A RoarGraph per KV head, searched with DIPRS.

Sources: RoarGraph (VLDB 2024) for construction, AlayaDB (arXiv 2504.10326, sections 6.1 and 7) for the search, window
caching, and sharing one graph among the query heads of a group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alaya_hf.kernels.cpu import graph_build, graph_search
from alaya_hf.kernels.cpu.numeric import check_queries, check_store, flat_store
from alaya_hf.kernels.knn import knn as exact_knn

_MIN_BATCH = 64  # keys linked against one state of the graph, at least, where it is projected from queries


@dataclass
class GraphHits:
    """What a search found.

    Attributes
    ----------
    ids : Tensor ``[total]`` int32, the answers of all query heads one after the other.
    offsets : Tensor ``[kv_heads * group + 1]`` int64, where each query head's ids begin.
    scores : Tensor ``[total]`` float32, inner products of the ids.
    touched : Tensor ``[kv_heads]`` int64, keys scored per KV head; summed over its query heads when they search apart.
    """

    ids: Tensor
    offsets: Tensor
    scores: Tensor
    touched: Tensor


class RoarGraph:
    """Graph index over the keys of one layer of one context.

    Parameters
    ----------
    degree : int
        Neighbours per key, at least 2. The index takes ``4 * degree`` bytes per key and KV head.
    query_ratio : float
        Sampled queries per key that the caller should bring to :meth:`build`, see :meth:`num_queries`; the paper's 0.4.
    knn : int
        Nearest keys per sampled query in the bipartite graph.
    per_key : int
        Queries per key whose lists are projected onto it.
    width : int
        Width of the search that finds a key's neighbours.
    entry_points : int
        Keys where searches start: those that together are near to the most sampled queries (greedy cover). 0 takes one
        per 256 keys, between 16 and 512.
    route : int
        Best-first expansions per group of queries that choose where DIPRS starts; 0 starts at the entry points.
    l0 : int
        Length up to which DIPRS takes every neighbour as a candidate.
    max_candidates : int
        Most candidates per search, at least 1; a bound on time where almost every key is critical.
    shared : bool
        Search once for all query heads of a group instead of once per query head. Faster, and finds at least as much.

    Notes
    -----
    Building costs ``2 * queries * tokens * head_dim`` operations for the exact nearest keys, the rest grows as
    ``tokens * log(tokens)``. Searching takes time in proportion to the critical tokens, hardly to the context.
    """

    def __init__(
        self,
        degree: int = 24,
        query_ratio: float = 0.4,
        knn: int = 32,
        per_key: int = 8,
        width: int = 32,
        entry_points: int = 0,
        route: int = 24,
        l0: int = 0,
        max_candidates: int = 8192,
        shared: bool = True,
    ) -> None:
        for name, value, least in (
            ("degree", degree, 2),
            ("knn", knn, 1),
            ("per_key", per_key, 1),
            ("width", width, 1),
            ("entry_points", entry_points, 0),
            ("route", route, 0),
            ("l0", l0, 0),
            ("max_candidates", max_candidates, 1),
        ):
            if int(value) != value or value < least:
                raise ValueError(f"graph.{name} must be an integer of at least {least}, but got {value!r}.")
        if not 0 < query_ratio <= 1:
            raise ValueError(f"graph.query_ratio must be in (0, 1], but got {query_ratio!r}.")
        self.degree, self.query_ratio, self.knn, self.per_key, self.width = degree, query_ratio, knn, per_key, width
        self.entry_points, self.route, self.l0 = entry_points, route, l0
        self.max_candidates, self.shared = max_candidates, shared
        self.num_tokens = 0
        self._adjacency = np.empty((0, 0, degree), np.int32)  # [kv_heads, capacity, degree]
        self._entries = np.empty((0, 0), np.int32)

    def num_queries(self, tokens: int) -> int:
        """Return how many queries per KV head to sample for this many keys."""
        return max(1, round(self.query_ratio * tokens))

    def _num_entries(self, tokens: int) -> int:
        return self.entry_points or min(512, max(16, tokens // 256))

    @property
    def adjacency(self) -> Tensor:
        """``[kv_heads, num_tokens, degree]`` int32, neighbour ids followed by -1; slot 0 is the next key."""
        return torch.from_numpy(self._adjacency[:, : self.num_tokens])

    @property
    def nbytes(self) -> int:
        """Bytes of the graph of the indexed tokens."""
        return self._adjacency.shape[0] * self.num_tokens * self.degree * 4 + self._entries.nbytes

    def build(self, kv: Tensor, queries: Tensor | None, device: torch.device | str | None = None) -> None:
        """Build the graph, replacing what was there.

        Parameters
        ----------
        kv : Tensor
            ``[kv_heads, n, 2, head_dim]`` on the host.
        queries : Tensor, optional
            ``[kv_heads, m, head_dim]`` post-RoPE queries sampled from the whole query group, any device. Without them
            the graph links near keys only.
        device : torch.device, optional
            Where the exact nearest keys are computed; by default a GPU if there is one.

        Raises
        ------
        ValueError
            If shapes disagree or a key is not finite.
        """
        self._check(kv, 0)
        heads, n, _, d = kv.shape
        self._adjacency = np.full((heads, n, self.degree), -1, np.int32)
        self._entries = np.full((heads, self._num_entries(n)), -1, np.int32)
        self.num_tokens = n
        if n == 0:
            return
        self._check_queries(queries, heads, d)
        for h in range(heads):
            adjacency, keys = self._adjacency[h], _float_keys(kv, h)
            if queries is not None and queries.shape[1]:
                nearest = exact_knn(queries[h], kv[h, :, 0].to(_knn_device(device)), self.knn).cpu().numpy()
                pointers, lists = _invert(nearest, n)
                self._entries[h] = _cover(nearest, pointers, lists, self._entries.shape[1])
                graph_build.project(*keys, d, nearest, pointers, lists, self.per_key, adjacency)
            else:
                self._entries[h] = np.arange(self._entries.shape[1]) * n // self._entries.shape[1]
            self._link(keys, d, h, 0, n)

    def extend(self, kv: Tensor, n_new: int, queries: Tensor | None = None) -> None:
        """Add the last ``n_new`` keys of ``kv``; the first ``num_tokens`` must be the ones indexed already.

        Parameters
        ----------
        kv : Tensor
            ``[kv_heads, num_tokens + n_new, 2, head_dim]`` on the host.
        n_new : int
        queries : Tensor, optional
            ``[kv_heads, m, head_dim]``; the keys that are near to the same query are linked as in :meth:`build`.

        Notes
        -----
        A new key costs one search, and one re-pruned row per neighbour. Entry points stay, and some of the
        new keys join them, unless ``queries`` come to choose them anew.
        """
        if n_new < 0 or kv.shape[1] != self.num_tokens + n_new:
            raise ValueError(
                f"expected kv of {self.num_tokens} indexed and {n_new} new tokens, but got {kv.shape[1]} tokens."
            )
        if self.num_tokens == 0:
            return self.build(kv, queries)
        first = self.num_tokens
        self._check(kv, first)
        heads, n, _, d = kv.shape
        if heads != self._adjacency.shape[0]:
            raise ValueError(f"the graph has {self._adjacency.shape[0]} KV heads, but kv has {heads}.")
        self._check_queries(queries, heads, d)
        missing = self._num_entries(n) - self._entries.shape[1]
        if missing > 0:
            spread = first + np.arange(missing, dtype=np.int32) * n_new // missing
            self._entries = np.concatenate([self._entries, np.tile(spread, (heads, 1))], axis=1, dtype=np.int32)
        if n > self._adjacency.shape[1]:
            grown = np.full((heads, max(n, first + first // 2), self.degree), -1, np.int32)
            grown[:, :first] = self._adjacency[:, :first]
            self._adjacency = grown
        for h in range(heads):
            keys = _float_keys(kv, h)
            self._adjacency[h, first - 1, 0] = first if n > first else self._adjacency[h, first - 1, 0]
            if queries is not None and queries.shape[1]:
                nearest = exact_knn(queries[h], kv[h, :, 0].to(_knn_device()), self.knn).cpu().numpy()
                pointers, lists = _invert(nearest, n)
                self._entries[h] = _cover(nearest, pointers, lists, self._entries.shape[1])
                projected = np.full((n, self.degree), -1, np.int32)
                graph_build.project(*keys, d, nearest, pointers, lists, self.per_key, projected)
                self._adjacency[h, first:n] = projected[first:]
            self._link(keys, d, h, first, n)
        self.num_tokens = n

    def _link(self, keys: tuple[np.ndarray, int, int], d: int, h: int, first: int, n: int) -> None:
        """Connectivity enhancement: find the neighbours of keys ``first .. n - 1``, add the edges and their reverse.

        Keys are linked in batches that double with the graph, so that each batch finds a graph worth searching.
        """
        adjacency = self._adjacency[h, :n]
        entries = self._entries[h][self._entries[h] >= 0]
        while first < n:
            known = n if adjacency[first, 0] >= 0 else first
            last = min(n, first + max(first, _MIN_BATCH if known == n else 1))
            ids, distances = graph_build.neighbours(*keys, d, adjacency, entries, first, last, known, self.width)
            graph_build.connect(*keys, d, adjacency, first, ids, distances, n)
            rows = adjacency[first:last]
            sources = np.broadcast_to(np.arange(first, last, dtype=np.int32)[:, None], rows.shape)[rows >= 0]
            ends = rows[rows >= 0]
            order = np.argsort(ends, kind="stable")
            targets, pointers = np.unique(ends[order], return_index=True)
            graph_build.connect_back(*keys, d, adjacency, sources[order], np.append(pointers, len(ends)), targets, n)
            first = last

    def search(
        self,
        q: Tensor,
        kv: Tensor,
        beta: float | Tensor,
        window_best: Tensor | None = None,
        limit: int | None = None,
        *,
        route: int | None = None,
        l0: int | None = None,
        max_candidates: int | None = None,
        shared: bool | None = None,
    ) -> GraphHits:
        """Find the critical tokens: DIPRS, see :func:`alaya_hf.kernels.cpu.graph_search.dipr_search_reference`.

        Parameters
        ----------
        q : Tensor
            ``[kv_heads, group, head_dim]`` float32.
        kv : Tensor
            ``[kv_heads, at least limit tokens, 2, head_dim]``, the store the graph was built on.
        beta : float or Tensor ``[kv_heads, group]``
            Range in units of scores, at least 0.
        window_best : Tensor, optional
            ``[kv_heads, group]``, the highest score inside the window.
        limit : int, optional
            Prefix filter: return only ids below it.
        route, l0, max_candidates, shared
            In place of the graph's own.
        """
        flat, stride, limit = self._prepare(q, kv, limit)
        heads, group, d = q.shape
        shape = (heads, group, d) if (self.shared if shared is None else shared) else (heads * group, 1, d)
        if isinstance(beta, Tensor):
            ranges = beta.to(torch.float32).expand(heads, group).numpy().reshape(shape[:2])
        else:
            ranges = np.full(shape[:2], beta, np.float32)
        if not (ranges >= 0).all():
            raise ValueError(f"beta must be at least 0, but got {beta!r}.")
        if window_best is None:
            best = np.full(shape[:2], -np.inf, np.float32)
        else:
            best = window_best.to(torch.float32).expand(heads, group).numpy().reshape(shape[:2])
        ids, scores, sizes, touched, best = graph_search.dipr_search(
            flat,
            stride,
            2 * d,
            self._adjacency,
            self._entries,
            q.contiguous().numpy().reshape(shape),
            np.repeat(np.arange(heads), shape[0] // max(heads, 1)),
            np.ascontiguousarray(best),
            np.ascontiguousarray(ranges),
            self.route if route is None else route,
            self.l0 if l0 is None else l0,
            min(self.max_candidates if max_candidates is None else max_candidates, max(limit, 1)),
            limit,
        )
        found, offsets, values = graph_search.collect(ids, scores, sizes, best, ranges)
        touched = touched.reshape(heads, -1).sum(1)
        return GraphHits(*(torch.from_numpy(x) for x in (found, offsets, values, touched)))

    def search_topk(
        self, q: Tensor, kv: Tensor, k: int, ef: int | None = None, limit: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Find the ``k`` keys with the largest inner products by best-first beam search of width ``ef >= k``.

        Returns
        -------
        ids : Tensor ``[kv_heads, group, k]`` int32, best first, -1 where fewer were found.
        scores : Tensor ``[kv_heads, group, k]`` float32, -inf there.
        touched : Tensor ``[kv_heads]`` int64, keys scored, summed over the query heads.
        """
        flat, stride, limit = self._prepare(q, kv, limit)
        heads, group, d = q.shape
        ids, scores, touched = graph_search.topk_search(
            flat,
            stride,
            2 * d,
            self._adjacency,
            self._entries,
            q.contiguous().numpy().reshape(heads * group, d),
            np.repeat(np.arange(heads), group),
            max(k, ef or k),
            k,
            limit,
        )
        shape = (heads, group, k)
        touched = torch.from_numpy(touched).view(heads, group).sum(1)
        return torch.from_numpy(ids).reshape(shape), torch.from_numpy(scores).reshape(shape), touched

    def state_dict(self) -> dict[str, Any]:
        """Return the graph as plain tensors (``adjacency``, ``entries``) and numbers (the parameters)."""
        names = ("degree", "query_ratio", "knn", "per_key", "width", "entry_points", "route", "l0", "max_candidates")
        state: dict[str, Any] = {name: getattr(self, name) for name in names}
        state["shared"] = int(self.shared)
        state["adjacency"] = self.adjacency.contiguous()
        state["entries"] = torch.from_numpy(self._entries)
        return state

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> RoarGraph:
        """Rebuild a graph from :meth:`state_dict`; tensors may be read-only or memory-mapped, they are not written."""
        state = dict(state)
        adjacency, entries = state.pop("adjacency"), state.pop("entries")
        graph = cls(**{**state, "shared": bool(state["shared"])})
        if adjacency.ndim != 3 or adjacency.shape[2] != graph.degree or entries.shape[0] != adjacency.shape[0]:
            raise ValueError(
                f"a graph of degree {graph.degree} needs adjacency [kv_heads, tokens, {graph.degree}] and entries "
                f"[kv_heads, {graph.entry_points}], but got {tuple(adjacency.shape)} and {tuple(entries.shape)}."
            )
        if adjacency.numel() and not (-1 <= int(adjacency.min()) and int(adjacency.max()) < adjacency.shape[1]):
            raise ValueError(
                "the adjacency holds ids outside the context; the stored graph is damaged, build it again."
            )
        if entries.numel() and not (-1 <= int(entries.min()) and int(entries.max()) < adjacency.shape[1]):
            raise ValueError("an entry point lies outside the context; the stored graph is damaged, build it again.")
        # In place: `extend` grows into a copy before it writes.
        graph._adjacency = adjacency.contiguous().numpy()
        graph._entries = entries.contiguous().numpy()
        graph.num_tokens = adjacency.shape[1]
        return graph

    def _prepare(self, q: Tensor, kv: Tensor, limit: int | None) -> tuple[np.ndarray, int, int]:
        check_store(kv)
        check_queries(q, kv.shape[0], kv.shape[3])
        limit = self.num_tokens if limit is None else min(limit, self.num_tokens)
        if limit < 0 or kv.shape[1] < limit or (self.num_tokens and kv.shape[0] != self._adjacency.shape[0]):
            raise ValueError(
                f"a search of {limit} tokens in a graph of {self._adjacency.shape[0]} KV heads needs their keys, but "
                f"kv is {tuple(kv.shape)}."
            )
        if self._adjacency.shape[0] == 0:
            self._adjacency = np.empty((kv.shape[0], 0, self.degree), np.int32)
            self._entries = np.full((kv.shape[0], 0), -1, np.int32)
        return (*flat_store(kv), limit)

    @staticmethod
    def _check(kv: Tensor, first: int) -> None:
        check_store(kv)
        new = kv[:, first:, 0]
        if not bool(torch.isfinite(new.sum())) and not bool(torch.isfinite(new).all()):
            raise ValueError("the keys hold NaN or infinity; a graph needs finite keys.")

    @staticmethod
    def _check_queries(queries: Tensor | None, heads: int, d: int) -> None:
        if queries is not None and (queries.ndim != 3 or queries.shape[0] != heads or queries.shape[2] != d):
            raise ValueError(f"expected sampled queries [{heads}, m, {d}], but got {tuple(queries.shape)}.")


def _knn_device(device: torch.device | str | None = None) -> torch.device | str:
    return device or ("cuda" if torch.cuda.is_available() else "cpu")


def _float_keys(kv: Tensor, h: int) -> tuple[np.ndarray, int, int]:
    """Return one head's keys for construction: a flat float32 array, where the first key starts, and the stride.

    Float32 keys are used in place; 16-bit keys are converted, once per head, since construction reads each many times.
    """
    if kv.dtype == torch.float32:
        flat, stride = flat_store(kv)
        return flat, h * stride, 2 * kv.shape[3]
    return kv[h, :, 0].to(torch.float32).contiguous().view(-1).numpy(), 0, kv.shape[3]


def _invert(nearest: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Return, as CSR, the flat positions in ``nearest`` of each of the ``n`` keys."""
    flat = nearest.reshape(-1)
    pointers = np.zeros(n + 1, np.int64)
    np.cumsum(np.bincount(flat, minlength=n), out=pointers[1:])
    return pointers, np.argsort(flat, kind="stable")


def _cover(nearest: np.ndarray, pointers: np.ndarray, lists: np.ndarray, count: int) -> np.ndarray:
    """Choose greedily ``count`` keys that are among the nearest of as many queries as possible; -1 if keys run out."""
    n = len(pointers) - 1
    open_queries = np.ones(len(nearest), bool)
    hits = np.diff(pointers)
    chosen = np.full(count, -1, np.int32)
    for e in range(min(count, n)):
        k = int(hits.argmax())
        chosen[e] = k
        covered = lists[pointers[k] : pointers[k + 1]] // nearest.shape[1]
        covered = covered[open_queries[covered]]
        open_queries[covered] = False
        np.subtract.at(hits, nearest[covered].reshape(-1), 1)
        hits[chosen[: e + 1]] = -1
    return chosen
