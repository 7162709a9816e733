"""Scan of the signs of the keys, one bit per channel, with exact re-scoring of the candidates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from alaya_hf.errors import ConfigError
from alaya_hf.index.base import Hits, Index, Searcher
from alaya_hf.kernels import host
from alaya_hf.kernels.cpu.sign import SignKeys
from alaya_hf.query.base import Query
from alaya_hf.registry import INDEXES


@INDEXES.register("sign")
@dataclass(frozen=True)
class Sign(Index):
    """Estimate every score from 1-bit codes, then score exactly what may be critical.

    A sixteenth of the bytes of bfloat16 keys (and 8 bytes per key for the estimate). The estimate is coarse, so many
    candidates are fetched and re-scored; the 4-bit ``quantized`` index is the better choice where its bytes can be had.

    Parameters
    ----------
    margin : float
        A token becomes a candidate if its score plus ``margin`` standard deviations of its error reaches the cut made on
        scores minus as much. 2 misses a token near the cut with a probability of about 2 %.

    Notes
    -----
    RaBitQ (arXiv 2405.12497). ``Recovery`` and residuals that need the score of every token do not work with it: the scores
    are too coarse to estimate masses.
    """

    margin: float = 2.0

    def __post_init__(self) -> None:
        if not 0 <= float(self.margin) < float("inf"):
            raise ConfigError(f"index.margin must be at least 0, but got {self.margin!r}.")

    def check(self, query: Query) -> None:
        """See :meth:`Index.check`."""
        if query.needs_all_scores:
            raise ConfigError(
                f"query {query.kind!r} needs a good score of every token, which the index 'sign' does not have. Use the index "
                "'flat' or 'quantized'."
            )

    def open(self, segment: Any) -> SignSearcher:
        """See :meth:`Index.open`."""
        return SignSearcher(self, segment)


class SignSearcher(Searcher):
    """The codes of one segment."""

    def __init__(self, index: Sign, segment: Any) -> None:
        self.index, self.segment = index, segment
        self._signs = SignKeys(*segment.view.shape[::3])

    def extend(self, kv: Tensor, queries: Tensor | None = None) -> None:
        """See :meth:`Searcher.extend`."""
        self._signs.append(kv[:, :, 0])
        self.num_tokens += kv.shape[1]

    def state(self) -> dict[str, Tensor]:
        """The codes and their factors."""
        return self._signs.state_dict()

    def restore(self, state: dict[str, Tensor], tokens: int) -> None:
        """See :meth:`Searcher.restore`."""
        self._signs = SignKeys.from_state_dict(state, self._signs.kv_heads, self._signs.head_dim, tokens)
        self.num_tokens = tokens

    def search(self, q: Tensor, kv: Tensor, query: Query, best: Tensor, scaling: float, window_lse: Tensor) -> Hits:
        """See :meth:`Searcher.search`."""
        n = kv.shape[1]
        scores = host.sign_scores(q, self._signs)[:, :, :n]
        error = self.index.margin * q.norm(dim=-1, keepdim=True) * self._signs.spread[:, None, :n]
        threshold = query.threshold(scores - error, best, scaling, window_lse)
        ids, offsets, mask = host.select_threshold(scores + error, threshold)
        hits = Hits(ids, offsets, mask, touched=kv.shape[0] * n)
        self.segment.check(ids, offsets)
        return hits.with_scores(q, kv).cut(query, best, scaling, window_lse)

    @property
    def nbytes(self) -> int:
        """Bytes of the codes."""
        return self._signs.nbytes
