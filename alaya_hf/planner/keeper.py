"""The plan of one cache while it runs: made once, corrected by what its steps take."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from alaya_hf.config import TARGETS, AlayaConfig
from alaya_hf.errors import BudgetError
from alaya_hf.planner.model_plan import ModelPlan
from alaya_hf.planner.plan_model import Planner
from alaya_hf.probes import Monitor
from alaya_hf.units import bytes_text

#: Steps between two looks at the measurements.
REVIEW = 16
#: Factors between measured and expected that leave the estimates as they are.
_TOLERANCE = 1.25
#: What a move has to gain.
_GAIN = 0.95


class Keeper:
    """Holds a model's plan, compares its estimates with measured steps and proposes other plans.

    Parameters
    ----------
    planner : Planner

    Attributes
    ----------
    plan : ModelPlan or None
        None before the first tokens.
    moves : int
        How often layers changed their plans.
    """

    def __init__(self, planner: Planner) -> None:
        self.planner = planner
        self.plan: ModelPlan | None = None
        self.moves = 0
        self._reused = 0
        self._correction: dict[str, float] = {}
        self._tokens: list[float] | None = None
        self._said: set[str] = set()

    def start(self, context: int, batch: int, reused: int = 0, expected: int = 0) -> ModelPlan:
        """Make the plan for a context that is about to come in.

        Parameters
        ----------
        context, batch, reused
            See :meth:`Planner.plan`.
        expected : int
            Tokens that the cache will hold at the end, as far as one knows; 0: not known.

        Raises
        ------
        BudgetError, ConfigError
            See :meth:`Planner.plan`.
        """
        self._reused = reused
        room = max(expected, self.planner.room_for(context))
        self.plan = self.planner.plan(context, batch, reused=reused, room=room)
        self._say(self.plan)
        return self.plan

    def config_for(self, place: int) -> AlayaConfig:
        """Settings of the layer at a place among those that offload, without targets."""
        assert self.plan is not None
        number = self.planner.shape.number(place)
        own = self.planner.settings.for_layer(number).replace(**dict.fromkeys(TARGETS))
        return own.replace(
            **self.plan.layers[place][0].settings(),
            cuda_graphs=self.plan.cuda_graphs,
            max_sparse_queries=self.plan.passes,
        )

    def check(self, context: int, batch: int) -> None:
        """Refuse tokens or rows that the budget has no room for, before they come in.

        Raises
        ------
        BudgetError
        """
        plan, budget = self.plan, self.planner.settings.gpu_bytes
        if plan is None or budget is None or (context <= plan.room and batch <= plan.batch):
            return
        plans = [layer for layer, _ in plan.layers]
        room = max(context, plan.room)
        grown = self.planner.estimate_all(plans, context, batch, room, plan.cuda_graphs)
        if grown.device_bytes > budget:
            raise BudgetError(
                f"{batch} x {context} tokens would take {bytes_text(grown.device_bytes)} on the device, but gpu_memory="
                f"{self.planner.settings.gpu_memory!r} allows {bytes_text(budget)}; the plan was made for {plan.batch} x "
                f"{plan.room} tokens. Start with a cache that is told of the whole length, allow more, or use engine='host'."
            )
        self.plan = replace(plan, room=room, batch=max(batch, plan.batch), layers=grown.layers)

    def review(
        self, monitors: Sequence[Monitor | None], context: int, batch: int, between: float | None
    ) -> list[int]:  # fmt: skip
        """Correct the estimates by what steps took, and move layers where that pays.

        Parameters
        ----------
        monitors : sequence of Monitor or None
            Per layer.
        context, batch : int
        between : float or None
            Median seconds from one step to the next.

        Returns
        -------
        list of int
            Places of the layers that have another plan now; empty if measurements agree with the estimates.
        """
        plan = self.plan
        if plan is None or self.planner.settings.planner == "paper":
            return []
        correction, tokens, off = self._measured(plan, monitors, context, batch, between)
        longer = context > 1.5 * plan.context
        if not off and not longer:
            return []
        self._correction, self._tokens = correction, tokens
        fixed = [layer for layer, _ in plan.layers]
        current = self.planner.estimate_all(fixed, context, batch, plan.room, plan.cuda_graphs, correction, tokens)
        better = self.planner.plan(
            context,
            batch,
            reused=self._reused,
            fixed=fixed,
            correction=correction,
            tokens=tokens,
            room=max(plan.room, context),
        )
        moved = [i for i, (layer, _) in enumerate(better.layers) if layer != fixed[i]]
        if moved and self._pays(current, better):
            self.plan, self.moves = better, self.moves + 1
            self._say(better)
            return moved
        self.plan = replace(current, warnings=plan.warnings)
        self._say(better)
        return []

    def _measured(
        self, plan: ModelPlan, monitors: Sequence[Monitor | None], context: int, batch: int, between: float | None
    ) -> tuple[dict[str, float], list[float], bool]:  # fmt: skip
        """Corrections that make the estimates agree with the last steps, and whether any differs much from those in force."""
        now = self.planner.estimate_all(
            [layer for layer, _ in plan.layers],
            context,
            batch,
            plan.room,
            plan.cuda_graphs,
            self._correction,
            self._tokens,
        )
        correction, tokens = dict(self._correction), list(self._tokens or [1.0] * len(plan.layers))
        off, ratios, attention = False, [], 0.0
        for i, (monitor, (_, estimate)) in enumerate(zip(monitors, now.layers, strict=True)):
            if monitor is None or len(monitor.seconds) < REVIEW // 2:
                continue
            took = statistics.median(monitor.seconds)
            attention += took
            ratios.append(took / max(1e-9, estimate.seconds))
            if monitor.retrieved and estimate.tokens > 0:
                found = statistics.median(monitor.retrieved) + 1
                ratio = found / (estimate.tokens + 1)
                if not 1 / (2 * _TOLERANCE) <= ratio <= 2 * _TOLERANCE:
                    tokens[i], off = min(100.0, max(0.01, tokens[i] * ratio)), True
        if ratios:
            engine = plan.layers[0][0].engine
            ratio = statistics.median(ratios)
            if not 1 / _TOLERANCE <= ratio <= _TOLERANCE:
                correction[engine], off = correction.get(engine, 1.0) * ratio, True
            if between is not None and len(ratios) == len(plan.layers) and between > attention:
                rest = (between - attention) / max(1e-9, now.base_seconds)
                if not 1 / _TOLERANCE <= rest <= _TOLERANCE:
                    correction["model"], off = correction.get("model", 1.0) * rest, True
        return correction, tokens, off

    def _pays(self, current: ModelPlan, better: ModelPlan) -> bool:
        slo = self.planner.settings.slo_seconds
        if slo is not None and (current.tail > slo) != (better.tail > slo):
            return current.tail > slo
        kl = self.planner.settings.kl
        if kl is not None and current.kl > kl * 1.05 and better.kl < current.kl * _GAIN:
            return True
        return better.seconds < current.seconds * _GAIN

    def _say(self, plan: ModelPlan) -> None:
        """Each target that cannot be kept is warned about once."""
        for text in plan.warnings:
            name = text.partition("=")[0]
            if name not in self._said:
                self._said.add(name)
                warnings.warn(f"{text} Said once.", stacklevel=4)

    @property
    def corrections(self) -> Mapping[str, Any]:
        """Measured over estimated: times by engine (``model``: outside attention), tokens per layer."""
        return {**self._correction, "tokens": list(self._tokens or [])}
