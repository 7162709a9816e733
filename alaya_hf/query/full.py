"""Every token is critical: exact attention over the offloaded context."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from alaya_hf.query.base import Query
from alaya_hf.registry import QUERIES


@QUERIES.register("full")
@dataclass(frozen=True)
class Full(Query):
    """Attend to the whole context. Equals dense attention up to rounding."""

    @property
    def keeps_all(self) -> bool:
        """Always true."""
        return True

    def threshold(self, scores: Tensor, best: Tensor, scaling: float, window_lse: Tensor) -> Tensor:
        """Minus infinity for every head, see :meth:`Query.threshold`."""
        return torch.full_like(best, float("-inf"))
