"""How a model's attention is spread, per layer and group of query heads, and what leaving tokens out does to its answers."""

from __future__ import annotations

import json
import math
import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

from alaya_hf.engine.residual import BlockMean, LowBit
from alaya_hf.errors import CalibrationError
from alaya_hf.index import Coarse
from alaya_hf.planner.calibration import cache_folder
from alaya_hf.planner.layer_plan import LayerPlan
from alaya_hf.query import DIPR, Recovery, TopK

SCHEMA = 1
#: Shares of the attention mass at which the tokens needed are kept.
RECOVERIES = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995)
ALPHAS = (0.1, 0.012, 0.003, 0.001)


@dataclass(frozen=True)
class HeadGroup:
    """The query heads of one KV head, means over them and over steps.

    Attributes
    ----------
    window : float
        Share of the attention mass on the window.
    tokens : tuple of float
        Offloaded tokens that, with the window, hold each of :data:`RECOVERIES`.
    ranges : mapping of float to (float, float)
        ``alpha`` -> offloaded tokens within the range, and the share they hold with the window.
    """

    window: float
    tokens: tuple[float, ...]
    ranges: Mapping[float, tuple[float, float]]

    def needed(self, ratio: float, scale: float, offloaded: float) -> float:
        """Tokens for a share, where the context is `scale` times the profile's."""
        if ratio <= self.window:
            return 0.0
        xs = [self.window, *(r for r in RECOVERIES if r > self.window), 1.0]
        ys = [0.0, *(t * scale for r, t in zip(RECOVERIES, self.tokens, strict=True) if r > self.window), offloaded]
        return min(offloaded, _interpolate(ratio, xs, ys))

    def held(self, tokens: float, scale: float, offloaded: float) -> float:
        """Share that so many of the best tokens hold with the window: the inverse of :meth:`needed`."""
        if tokens >= offloaded:
            return 1.0
        pairs = [(t * scale, r) for r, t in zip(RECOVERIES, self.tokens, strict=True) if r > self.window]
        xs, ys = [0.0], [self.window]
        for x, y in [*pairs, (offloaded, 1.0)]:
            if x > xs[-1]:
                xs.append(x)
                ys.append(y)
        return _interpolate(tokens, xs, ys)

    def within(self, alpha: float, scale: float, offloaded: float) -> tuple[float, float]:
        """Tokens within a range and the share they hold."""
        if alpha <= 0:
            return offloaded, 1.0
        known = sorted(self.ranges)
        logs = [math.log(a) for a in known]
        x = min(max(math.log(alpha), logs[0]), logs[-1])
        tokens = _interpolate(x, logs, [math.log1p(self.ranges[a][0]) for a in known])
        missed = _interpolate(x, logs, [math.log(max(1e-6, 1 - self.ranges[a][1])) for a in known])
        # Below the narrowest range measured, what is missed shrinks about as alpha does.
        beyond = min(1.0, alpha / known[0])
        return min(offloaded, math.expm1(tokens) * scale / beyond**0.3), 1 - math.exp(missed) * beyond


def _interpolate(x: float, xs: Sequence[float], ys: Sequence[float]) -> float:
    at = min(max(1, bisect_left(xs, x)), len(xs) - 1)
    low, high = xs[at - 1], xs[at]
    share = min(1.0, max(0.0, (x - low) / (high - low))) if high > low else 1.0
    return ys[at - 1] + share * (ys[at] - ys[at - 1])


@dataclass(frozen=True)
class Profile:
    """What was measured of a model once.

    Attributes
    ----------
    model : str
    context : int
        Tokens of the text it was measured on.
    group : int
        Query heads per KV head.
    union : float
        Tokens of the union over a group, as a multiple of those of one head.
    layers : tuple of tuple of HeadGroup
    plans : tuple of mapping
        ``residual`` (see :func:`family`), ``recovery`` and ``kl`` of whole-model plans.
    shipped : bool
        Whether it is that of another model, which comes with the package.
    """

    model: str
    context: int
    group: int
    union: float
    layers: tuple[tuple[HeadGroup, ...], ...]
    plans: tuple[Mapping[str, Any], ...]
    shipped: bool = field(default=False, compare=False)

    def layer(self, number: int, layers: int) -> tuple[HeadGroup, ...]:
        """The groups of a layer of a model with so many layers: the profile's layer at the same depth."""
        if layers <= 1:
            return self.layers[0]
        return self.layers[round(number * (len(self.layers) - 1) / (layers - 1))]

    def union_of(self, group: int) -> float:
        """Union over a group of this size: grows in proportion to the other heads."""
        return 1 + (self.union - 1) * (group - 1) / max(1, self.group - 1) if self.group > 1 else 1 + 0.4 * (group - 1)

    @cached_property
    def _lines(self) -> dict[str, tuple[float, float]]:
        """Family -> intercept and slope of ``ln KL`` over ``ln (1 - recovery)``: least squares, the slope in [0.5, 3]."""
        lines = {}
        for name in {str(plan["residual"]) for plan in self.plans}:
            points = [
                (math.log(max(1e-4, 1 - plan["recovery"])), math.log(max(1e-8, plan["kl"])))
                for plan in self.plans
                if plan["residual"] == name
            ]
            x0 = sum(x for x, _ in points) / len(points)
            y0 = sum(y for _, y in points) / len(points)
            spread = sum((x - x0) ** 2 for x, _ in points)
            slope = sum((x - x0) * (y - y0) for x, y in points) / spread if spread else 1.5
            slope = min(3.0, max(0.5, slope))
            lines[name] = (y0 - slope * x0, slope)
        return lines

    def kl(self, plan: LayerPlan, recovery: float) -> float:
        """KL in nats per token if every layer ran this plan and held this share of the mass exactly."""
        if recovery >= 1:
            return 0.0
        lines = self._lines
        name = family(plan)
        intercept, slope = lines[name] if name in lines else lines["none"]
        return math.exp(intercept + slope * math.log(max(1e-4, 1 - recovery)))

    def to_json(self) -> str:
        """As text."""
        data = {
            "schema": SCHEMA, "kind": "alaya_hf.profile", "model": self.model, "context": self.context, "group": self.group,
            "union": self.union, "recoveries": list(RECOVERIES), "plans": [dict(plan) for plan in self.plans],
            "layers": [
                [
                    {"window": g.window, "tokens": list(g.tokens), "ranges": [[a, *g.ranges[a]] for a in sorted(g.ranges)]}
                    for g in groups
                ]
                for groups in self.layers
            ],
        }  # fmt: skip
        return json.dumps(data, indent=None, separators=(",", ":")).replace('],"layers"', '],\n"layers"') + "\n"

    @classmethod
    def from_json(cls, text: str, source: str = "profile", shipped: bool = False) -> Profile:
        """The inverse of :meth:`to_json`.

        Raises
        ------
        CalibrationError
        """
        try:
            data = json.loads(text)
            if data.get("kind") != "alaya_hf.profile" or data.get("schema") != SCHEMA:
                raise ValueError(f"it has kind {data.get('kind')!r} and schema {data.get('schema')!r}")
            if tuple(data["recoveries"]) != RECOVERIES:
                raise ValueError(f"its shares are {data['recoveries']}, not {list(RECOVERIES)}")
            layers = tuple(
                tuple(
                    HeadGroup(
                        float(g["window"]), tuple(map(float, g["tokens"])), {a: (t, r) for a, t, r in g["ranges"]}
                    )
                    for g in groups
                )
                for groups in data["layers"]
            )
            if not layers or not all(groups and all(g.ranges for g in groups) for groups in layers):
                raise ValueError("it has a layer without head groups or ranges")
            plans = tuple(
                {"residual": str(p["residual"]), "recovery": float(p["recovery"]), "kl": float(p["kl"])}
                for p in data["plans"]
            )
            if not any(plan["residual"] == "none" for plan in plans):
                raise ValueError("it has no plan without a residual")
            return cls(
                data["model"], int(data["context"]), int(data["group"]), float(data["union"]), layers, plans, shipped
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CalibrationError(
                f"{source} is no profile of schema {SCHEMA}: {error}. Measure again with `python -m eval profile MODEL`."
            ) from error


def family(plan: LayerPlan) -> str:
    """What answers for the tokens left out: ``none``, ``low_bit42``, ``low_bit44``, ``means`` or ``key_means``."""
    residual = plan.residual
    if isinstance(residual, LowBit):
        return f"low_bit{residual.key_bits}{residual.value_bits}"
    if isinstance(residual, BlockMean):
        return "key_means" if residual.keys is True or not plan.index.scores_all else "means"
    return "none"


def expected(plan: LayerPlan, groups: Sequence[HeadGroup], scale: float, offloaded: float) -> list[tuple[float, float]]:
    """Tokens attended exactly per query head, and the share they hold with the window, of each group of query heads.

    Parameters
    ----------
    plan : LayerPlan
    groups : sequence of HeadGroup
        Of the layer.
    scale : float
        Context as a multiple of the profile's.
    offloaded : float
        Tokens outside the window.
    """
    query = plan.query
    if offloaded <= 0 or query.keeps_all:
        return [(max(0.0, offloaded), 1.0)] * len(groups)
    cap = getattr(query, "cap", None)
    if plan.engine == "device" and cap is None and not isinstance(query, TopK):
        from alaya_hf.engine.device.plan import DEFAULT_BLOCKS, DEFAULT_CAP

        cap = DEFAULT_BLOCKS * plan.index.block if isinstance(plan.index, Coarse) else DEFAULT_CAP
    found = []
    for group in groups:
        if isinstance(query, Recovery):
            tokens = group.needed(query.ratio, scale, offloaded)
            share = max(query.ratio, group.window)
        elif isinstance(query, DIPR):
            alpha = query.alpha if query.alpha is not None else 0.012
            tokens, share = group.within(alpha, scale, offloaded)
        else:
            tokens = float(min(offloaded, getattr(query, "k", offloaded)))
            share = group.held(tokens, scale, offloaded)
        if cap is not None and tokens > cap:
            tokens, share = float(cap), min(share, group.held(cap, scale, offloaded))
        found.append((tokens, share))
    return found


def profile_path(model: str) -> Path:
    """Where the profile of a model is kept."""
    return cache_folder() / "profiles" / (re.sub(r"[^A-Za-z0-9._-]+", "--", model).strip("-") + ".json")


def load_profile(model: str = "") -> Profile:
    """The profile of a model, or the one that comes with the package (SmolLM2-135M over contracts).

    Raises
    ------
    CalibrationError
        For a damaged file.
    """
    if model:
        file = profile_path(model)
        if file.is_file():
            return Profile.from_json(file.read_text(encoding="utf-8"), str(file))
    text = (resources.files("alaya_hf.planner") / "data" / "profile.json").read_text(encoding="utf-8")
    return Profile.from_json(text, "the profile of the package", shipped=True)
