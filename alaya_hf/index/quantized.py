"""Scan of a low-bit copy of all keys, with exact re-scoring of the candidates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from alaya_hf.errors import ConfigError
from alaya_hf.index.base import Hits, Index, Searcher
from alaya_hf.kernels import host
from alaya_hf.query import Query
from alaya_hf.registry import INDEXES


@INDEXES.register("quantized")
@dataclass(frozen=True)
class Quantized(Index):
    """Score every key from a low-bit copy (min-max per channel per 64 tokens).

    Parameters
    ----------
    bits : {2, 4, 8}
        Of the keys. 4 bits take 28 % of bfloat16 keys with their steps.
    margin : float
        Re-scoring: tokens whose approximate score misses the cut by up to ``margin`` standard deviations of the score's
        quantisation error become candidates, are scored exactly, and the cut is applied to the exact scores. With 2 the
        answer misses a token near the cut with a probability of about 2 % and never contains a wrong one. 0: the cut is
        made on the approximate scores; nothing is re-scored, and tokens near the cut may be swapped.
    """

    bits: int = 4
    margin: float = 2.0

    scores_all: ClassVar[bool] = True
    stateless: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.bits not in (2, 4, 8):
            raise ConfigError(f"index.bits must be 2, 4 or 8, but got {self.bits!r}.")
        if not 0 <= float(self.margin) < float("inf"):
            raise ConfigError(f"index.margin must be at least 0, but got {self.margin!r}.")

    def open(self, segment: Any) -> QuantizedSearcher:
        """See :meth:`Index.open`."""
        return QuantizedSearcher(self, segment)


class QuantizedSearcher(Searcher):
    """Reads the segment's low-bit copy, which the ``low_bit`` residual shares."""

    def __init__(self, index: Quantized, segment: Any) -> None:
        self.index, self.segment = index, segment
        # Running sum of squared steps per channel, for the error of a score.
        self._squares: Tensor | None = None
        self._groups = 0

    def extend(self, kv: Tensor, queries: Tensor | None = None) -> None:
        """See :meth:`Searcher.extend`."""
        low = self.segment.lowbit(self.index.bits, None)
        self.num_tokens += kv.shape[1]
        groups = low.full_groups
        if groups > self._groups:
            squares = low.key_scale[:, self._groups : groups].float().square().sum(dim=1)
            self._squares = squares if self._squares is None else self._squares + squares
            self._groups = groups

    def state(self) -> dict[str, Tensor]:
        """Nothing: the segment stores its low-bit copy."""
        return {}

    def restore(self, state: dict[str, Tensor], tokens: int) -> None:
        """See :meth:`Searcher.restore`."""
        self.extend(self.segment.view[:, :tokens])

    def _error(self, q: Tensor) -> Tensor:
        """Standard deviation of the error of a score, ``[kv_heads, group]``: rounding is uniform within a step."""
        if self._squares is None:
            return torch.zeros(q.shape[:2])
        variance = self._squares / self._groups / 12
        return torch.einsum("hgd,hd->hg", q.square(), variance).sqrt()

    def search(self, q: Tensor, kv: Tensor, query: Query, best: Tensor, scaling: float, window_lse: Tensor) -> Hits:
        """See :meth:`Searcher.search`."""
        n = kv.shape[1]
        scores = host.lowbit_scores(q, self.segment.lowbit(self.index.bits, None))[:, :, :n]
        threshold = query.threshold(scores, best, scaling, window_lse)
        touched = kv.shape[0] * n
        rescore = self.index.margin > 0 and query.cut_again
        if rescore:
            threshold = threshold - self.index.margin * self._error(q)
        ids, offsets, mask = host.select_threshold(scores, threshold)
        hits = Hits(ids, offsets, mask, touched=touched, all_scores=scores)
        if not rescore:
            return hits
        self.segment.check(ids, offsets)
        return hits.with_scores(q, kv).cut(query, best, scaling, window_lse)

    @property
    def nbytes(self) -> int:
        """Bytes of the copy of the keys; zero where the ``low_bit`` residual has made it and counts it."""
        return self.segment.lowbit_nbytes(self.index.bits, None)
