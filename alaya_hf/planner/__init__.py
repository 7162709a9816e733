"""Which query on which index, per layer and step."""

from alaya_hf.planner.choose import choose

__all__ = ["choose"]
