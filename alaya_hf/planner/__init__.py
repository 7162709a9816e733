"""Which query on which index, residual and engine, per layer and step."""

from alaya_hf.planner.choose import choose
from alaya_hf.planner.model_plan import ModelPlan
from alaya_hf.planner.plan_model import Planner
from alaya_hf.planner.shape import ModelShape

__all__ = ["ModelPlan", "ModelShape", "Planner", "choose"]
