"""What the query leaves out is ignored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from alaya_hf.engine.residual.base import Residual
from alaya_hf.index import Hits
from alaya_hf.kernels.partial import Partial
from alaya_hf.registry import RESIDUALS
from alaya_hf.storage import Piece, Segment


@RESIDUALS.register("none")
@dataclass(frozen=True)
class NoResidual(Residual):
    """Attention over window and retrieved tokens alone, as in the published systems."""

    is_none: ClassVar[bool] = True

    def prepare(self, segment: Segment) -> None:
        """Nothing to prepare."""

    def nbytes(self, segment: Segment) -> int:
        """Zero."""
        return 0

    def estimate(self, q: Tensor, piece: Piece, hits: Hits, mask: Tensor | None, scaling: float) -> Partial:
        """The partial of no tokens."""
        return Partial.empty(q.shape[:2], q.shape[2])
