"""What one layer does in one step with its offloaded tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Plan:
    """What one layer does in one step with its offloaded tokens.

    Attributes
    ----------
    query : Query
    index : Index
    residual : Residual
    reason : str
        Why this plan and no other, for people.
    """

    query: Any
    index: Any
    residual: Any
    reason: str
