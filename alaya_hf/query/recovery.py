"""As many tokens as it takes to hold a share of the attention mass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from alaya_hf.errors import ConfigError
from alaya_hf.kernels.cpu.select import kth_largest, recovery_threshold
from alaya_hf.query.base import Query, check_cap
from alaya_hf.registry import QUERIES


@QUERIES.register("recovery")
@dataclass(frozen=True)
class Recovery(Query):
    """The highest-scoring tokens that, with the window, hold ``ratio`` of the attention mass, per query head and step.

    The mass is estimated from the scores at hand: exact ones from ``flat``, approximate ones from ``quantized``. Indexes
    that do not score every token (``graph``, ``coarse``) cannot answer it.

    Parameters
    ----------
    ratio : float
        In (0, 1]; 1 keeps everything.
    cap : int, optional
        Most offloaded tokens per query head, the ones with the highest scores (and those that tie with the last). The
        default is no cap; ``engine="device"`` then takes 256, and serves at most 512.
    """

    ratio: float = 0.95
    cap: int | None = None

    needs_all_scores: ClassVar[bool] = True
    # The share is one of all tokens' mass. Every segment keeps its own share, so together they keep it.
    cut_again: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0 < float(self.ratio) <= 1:
            raise ConfigError(f"query.ratio must be in (0, 1], but got {self.ratio!r}.")
        check_cap(self.cap)

    @property
    def keeps_all(self) -> bool:
        """Whether ``ratio`` is 1 and nothing caps it."""
        return self.ratio == 1 and self.cap is None

    @property
    def cuts_segments(self) -> bool:
        """Whether there is a cap, which is one for all segments together."""
        return self.cap is not None

    def threshold(self, scores: Tensor, best: Tensor, scaling: float, window_lse: Tensor) -> Tensor:
        """The score of the last token needed, or the ``cap``-th highest score; see :meth:`Query.threshold`."""
        threshold = recovery_threshold(scores, scaling, self.ratio, window_lse)
        return torch.maximum(threshold, self.threshold_over_segments(scores, best, scaling, window_lse))

    def threshold_over_segments(self, scores: Tensor, best: Tensor, scaling: float, window_lse: Tensor) -> Tensor:
        """The ``cap``-th highest score, see :meth:`Query.threshold_over_segments`."""
        if self.cap is None or scores.shape[-1] <= self.cap:
            return torch.full_like(best, float("-inf"))
        return kth_largest(scores.contiguous(), self.cap)
