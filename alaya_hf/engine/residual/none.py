"""What the query leaves out is ignored."""

from __future__ import annotations

from dataclasses import dataclass

from alaya_hf.registry import RESIDUALS


@RESIDUALS.register("none")
@dataclass(frozen=True)
class NoResidual:
    """Attention over window and retrieved tokens alone, as in the published systems."""
