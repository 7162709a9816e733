"""The k tokens with the highest inner products."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from alaya_hf.errors import ConfigError
from alaya_hf.kernels.cpu.select import kth_largest
from alaya_hf.query.base import Query
from alaya_hf.registry import QUERIES


@QUERIES.register("topk")
@dataclass(frozen=True)
class TopK(Query):
    """The ``k`` offloaded tokens with the highest scores, per query head.

    Parameters
    ----------
    k : int
        How many, in addition to the window. 0 attends to the window alone. Tokens that tie with the k-th are kept too.
        RetrievalAttention (arXiv 2409.10516) uses 100, and 2000 for key-value retrieval.
    """

    k: int = 100

    def __post_init__(self) -> None:
        if isinstance(self.k, bool) or not isinstance(self.k, int) or self.k < 0:
            raise ConfigError(f"query.k must be an integer of at least 0, but got {self.k!r}.")

    @property
    def keeps_none(self) -> bool:
        """Whether ``k`` is 0."""
        return self.k == 0

    def threshold(self, scores: Tensor, best: Tensor, scaling: float, window_lse: Tensor) -> Tensor:
        """The k-th highest score, see :meth:`Query.threshold`."""
        n = scores.shape[-1]
        if self.k == 0:
            return torch.full_like(best, float("inf"))
        if self.k >= n:
            return torch.full_like(best, float("-inf"))
        return kth_largest(scores.contiguous(), self.k)
