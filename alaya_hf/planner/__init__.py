"""Which query on which index, per layer and step."""

from alaya_hf.planner.plan import Plan, choose

__all__ = ["Plan", "choose"]
