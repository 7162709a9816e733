"""The plans of all layers, and what they come to."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from alaya_hf.config import TARGETS, AlayaConfig
from alaya_hf.planner.layer_plan import Estimate, LayerPlan
from alaya_hf.planner.memory import exact_cap, workspace_bytes
from alaya_hf.planner.shape import ModelShape


@dataclass(frozen=True)
class ModelPlan:
    """What the layers of a model do over a context.

    Attributes
    ----------
    settings : AlayaConfig
        What was asked for.
    shape : ModelShape
    context : int
        Tokens it was made for; estimates of time are at this length.
    room : int
        Tokens up to which its memory was counted.
    batch : int
    cuda_graphs : str
    layers : tuple of (LayerPlan, Estimate)
    base_seconds : float
        A decode step without attention.
    passes : int
        Tokens of the longest pass that retrieves, ``max_sparse_queries``.
    warnings : tuple of str
        What of the targets cannot be kept, and the best there is.
    sources : tuple of str
        Where costs and qualities come from.
    """

    settings: AlayaConfig
    shape: ModelShape
    context: int
    room: int
    batch: int
    cuda_graphs: str
    layers: tuple[tuple[LayerPlan, Estimate], ...]
    base_seconds: float
    passes: int = 1
    warnings: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()

    @property
    def attention_seconds(self) -> float:
        """Of all layers, per step."""
        return sum(estimate.seconds for _, estimate in self.layers)

    @property
    def seconds(self) -> float:
        """Of a decode step."""
        return self.base_seconds + self.attention_seconds

    @property
    def tail(self) -> float:
        """95th percentile of a decode step: what an SLO is held against."""
        return self.base_seconds + sum(estimate.tail for _, estimate in self.layers)

    @property
    def kl(self) -> float:
        """From full attention's next token, nats."""
        return sum(estimate.kl for _, estimate in self.layers)

    @property
    def recovery(self) -> float:
        """Mean over layers of the worst group of query heads."""
        return sum(estimate.recovery for _, estimate in self.layers) / len(self.layers)

    @property
    def workspace_bytes(self) -> int:
        """Of buffers that layers share."""
        keys = {shared_key(plan): plan for plan, _ in self.layers}
        return sum(workspace_bytes(plan, self.shape, self.room, self.batch, self.passes) for plan in keys.values())

    @property
    def device_bytes(self) -> int:
        """Most bytes on the device up to `room` tokens."""
        return sum(estimate.device_bytes for _, estimate in self.layers) + self.workspace_bytes

    @property
    def host_bytes(self) -> int:
        """In host memory at `room` tokens."""
        return sum(estimate.host_bytes for _, estimate in self.layers)

    def config(self) -> AlayaConfig:
        """Settings that do exactly this, without targets. ``layers`` names every layer that differs from the first one."""
        free = dict.fromkeys(TARGETS)
        first = self.layers[0][0]
        base = self.settings.replace(
            **free, **first.settings(), cuda_graphs=self.cuda_graphs, max_sparse_queries=self.passes
        )
        layers: dict[int | str, Any] = {key: dict(value) for key, value in self.settings.layers.items()}
        for place, (plan, _) in enumerate(self.layers):
            number = self.shape.number(place)
            changes = {
                name: value for name, value in plan.settings().items() if getattr(base.for_layer(number), name) != value
            }
            if changes:
                layers[number] = {**layers.get(number, {}), **changes}
        return base.replace(layers=layers)

    def with_warnings(self, *texts: str) -> ModelPlan:
        """The same with more to say."""
        return replace(self, warnings=(*self.warnings, *texts))


def shared_key(plan: LayerPlan) -> tuple[Any, ...]:
    """Layers with equal keys share the buffers of a step."""
    if plan.engine != "device":
        return ("host",)
    stored = getattr(plan.index, "bits", plan.index), getattr(plan.residual, "value_bits", plan.residual.is_none)
    return plan.engine, *stored, exact_cap(plan), plan.window
