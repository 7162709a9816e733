"""As many tokens as it takes to hold a share of the attention mass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from alaya_hf.errors import ConfigError
from alaya_hf.kernels.cpu.select import recovery_threshold
from alaya_hf.query.base import Query
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
    """

    ratio: float = 0.95

    needs_all_scores: ClassVar[bool] = True
    # Every segment keeps its own share, so together they keep it: nothing to cut again over several segments.
    cut_again: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0 < float(self.ratio) <= 1:
            raise ConfigError(f"query.ratio must be in (0, 1], but got {self.ratio!r}.")

    @property
    def keeps_all(self) -> bool:
        """Whether ``ratio`` is 1."""
        return self.ratio == 1

    def threshold(self, scores: Tensor, best: Tensor, scaling: float, window_lse: Tensor) -> Tensor:
        """The score of the last token needed, see :meth:`Query.threshold`."""
        return recovery_threshold(scores, scaling, self.ratio, window_lse)
