"""Dynamic inner-product range query."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from alaya_hf.errors import ConfigError
from alaya_hf.kernels.cpu.select import kth_largest, row_max
from alaya_hf.query.base import Query, check_cap
from alaya_hf.registry import QUERIES


@QUERIES.register("dipr")
@dataclass(frozen=True)
class DIPR(Query):
    """Every token whose score is within ``beta`` of the best: ``q.k_j >= max_s q.k_s - beta``.

    The number of tokens follows the head and the step instead of being fixed. The maximum runs over the whole context,
    window included.

    Parameters
    ----------
    alpha : float, optional
        Smallest attention weight that counts, relative to the largest one, in (0, 1]: ``beta = -ln(alpha) / scaling``.
        The default is 0.012, which is ``beta = 50`` at head dimension 128, the paper's setting. 0 keeps everything.
    beta : float, optional
        The range in units of scores, at least 0; ``inf`` keeps everything. Takes the place of ``alpha``.
    cap : int, optional
        Most offloaded tokens per query head, the ones with the highest scores (and those that tie with the last). Heads whose
        attention is spread wide, the first layer's above all, otherwise hold thousands of tokens within the range. The
        default is no cap, as in the paper; ``engine="device"`` then takes 256, and serves at most 512.

    Notes
    -----
    AlayaDB (arXiv 2504.10326), section 6.1, definition 3; the cap is ours.
    """

    alpha: float | None = None
    beta: float | None = None
    cap: int | None = None

    def __post_init__(self) -> None:
        if self.alpha is not None and self.beta is not None:
            raise ConfigError(f"query: give alpha or beta, not both (alpha={self.alpha}, beta={self.beta}).")
        if self.beta is not None:
            value = float(self.beta)
            if math.isnan(value) or value < 0:
                raise ConfigError(f"query.beta must be at least 0, but got {self.beta!r}.")
        else:
            alpha = 0.012 if self.alpha is None else float(self.alpha)
            if not 0 <= alpha <= 1:
                raise ConfigError(f"query.alpha must be in [0, 1], but got {self.alpha!r}.")
            object.__setattr__(self, "alpha", alpha)
        check_cap(self.cap)

    def range(self, scaling: float) -> float:
        """``beta`` in units of scores for this ``scaling``."""
        if self.beta is not None:
            return float(self.beta)
        assert self.alpha is not None
        return math.inf if self.alpha == 0 else -math.log(self.alpha) / scaling

    @property
    def keeps_all(self) -> bool:
        """Whether the range is infinite and nothing caps it."""
        return (self.beta == math.inf or self.alpha == 0) and self.cap is None

    def threshold(self, scores: Tensor, best: Tensor, scaling: float, window_lse: Tensor) -> Tensor:
        """The best score minus ``beta``, or the ``cap``-th highest score; see :meth:`Query.threshold`."""
        if scores.shape[-1]:
            scores = scores.contiguous()
            best = torch.maximum(best, row_max(scores))
        threshold = best - self.range(scaling)
        if self.cap is None or scores.shape[-1] <= self.cap:
            return threshold
        return torch.maximum(threshold, kth_largest(scores, self.cap))
