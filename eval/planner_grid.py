"""The planner's choices against an exhaustive search over the same plans, every one of them measured."""

from __future__ import annotations

import math
from typing import Any

import torch

from alaya_hf import AlayaConfig
from alaya_hf.planner import ModelShape, Planner
from alaya_hf.planner.calibration import Calibration
from alaya_hf.planner.candidates import candidates, windows
from alaya_hf.planner.layer_plan import LayerPlan
from alaya_hf.planner.measure_host import sample_layer
from alaya_hf.planner.plan_model import DEFAULT_KL
from alaya_hf.planner.profile import ALPHAS, RECOVERIES, HeadGroup, Profile, load_profile


def host_seconds(plan: LayerPlan, shape: ModelShape, tokens: int) -> tuple[float, int]:
    """Measured seconds of one layer's decode step on the host, and bytes of its window."""
    from alaya_hf.cli.calibrate import host_step
    from alaya_hf.planner.memory import device_bytes

    settings = AlayaConfig(
        query=plan.query, index=plan.index, residual=plan.residual, window=plan.window, min_context=0
    )
    return host_step(settings, shape, tokens)[0], device_bytes(plan, shape, tokens, 1)


def device_seconds(plan: LayerPlan, shape: ModelShape, tokens: int) -> tuple[float, int]:
    """Measured seconds of one layer's decode step on a GPU, and bytes that the layer holds there."""
    from alaya_hf.planner.measure_device import plan_seconds
    from alaya_hf.planner.memory import device_bytes

    return plan_seconds(plan, shape, tokens), device_bytes(plan, shape, tokens, 1)


def sample_profile(shape: ModelShape, context: int, shipped: Profile) -> Profile:
    """A profile of the very layer that is measured, so that times are judged and not the spread of its attention.

    Parameters
    ----------
    shipped : Profile
        Whose KL per recovery is used.
    """
    kv, q = sample_layer(shape, context)
    window, scaling = AlayaConfig().window, shape.head_dim**-0.5
    logits = (q @ kv[:, :, 0].float().transpose(1, 2)) * scaling
    inside = slice(window.init, context - window.local)
    lse = logits.logsumexp(-1, keepdim=True)
    weights = (logits - lse).exp()
    outside = weights[:, :, inside]
    held = 1 - outside.sum(-1)
    sums = held.unsqueeze(-1) + outside.sort(dim=-1, descending=True).values.double().cumsum(-1).float()
    wanted = torch.tensor(RECOVERIES).expand(*held.shape, len(RECOVERIES)).contiguous()
    needed = torch.where(wanted <= held.unsqueeze(-1), 0, torch.searchsorted(sums, wanted) + 1).float()
    needed = needed.clamp(max=outside.shape[-1])
    ranges = {}
    unions = []
    for alpha in ALPHAS:
        cut = logits[:, :, inside] >= logits.amax(-1, keepdim=True) + math.log(alpha)
        ranges[alpha] = cut.sum(-1).float(), held + torch.where(cut, outside, 0.0).sum(-1)
        unions.append(float(cut.any(1).sum(-1).float().mean() / cut.sum(-1).float().mean().clamp(min=1e-9)))
    groups = tuple(
        HeadGroup(
            float(held[h].mean()), tuple(needed[h].mean(0).tolist()),
            {alpha: (float(tokens[h].mean()), float(share[h].mean())) for alpha, (tokens, share) in ranges.items()},
        )
        for h in range(shape.kv_heads)
    )  # fmt: skip
    return Profile("the layer measured", context, shape.group, max(1.0, unions[2]), (groups,), shipped.plans)


def grid(
    shape: ModelShape, calibration: Calibration, contexts: tuple[int, ...], engine: str, advance: Any = None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:  # fmt: skip
    """Cases of context, budget and SLO for one layer.

    Parameters
    ----------
    shape : ModelShape
        Of one layer; its other costs are left out.
    engine : {"host", "device"}

    Returns
    -------
    cases, plans : list of dict
        Per case the planner's choice and the best there is; per plan and context what was predicted and measured.

    Notes
    -----
    Budgets: everything, the middle between the smallest and the largest plan, and 10 % more than the smallest. SLOs: 1.1 times
    the fastest plan that fits and keeps the KL, the median of those, and half of the fastest, which nothing keeps.
    """
    cases, measured_rows = [], []
    base = AlayaConfig(planner="cost", engine=engine)
    shipped = load_profile()
    take = host_seconds if engine == "host" else device_seconds
    window, whole = windows(base)[0]
    for context in contexts:
        profile = sample_profile(shape, context, shipped)
        planner = Planner(base, shape, calibration, profile)
        found: dict[LayerPlan, tuple[float, int]] = {}
        for plan in candidates(base, 0, shape, engine, window, whole):
            found[plan] = take(plan, shape, context)
            estimate = planner.estimate(plan, 0, context, 1, context)
            measured_rows.append(
                {"context": context, "query": plan.names()[0], "residual": plan.names()[2],
                 "predicted ms": 1e3 * estimate.seconds,
                 "measured ms": 1e3 * found[plan][0], "KL": estimate.kl, "device MiB": found[plan][1] / 2**20}
            )  # fmt: skip
            if advance is not None:
                advance()
        estimates = {plan: planner.estimate(plan, 0, context, 1, Planner.room_for(context)) for plan in found}
        sizes = sorted(estimate.device_bytes for estimate in estimates.values())
        shared = planner.estimate_all([next(iter(found))], context, 1).workspace_bytes * 2
        budgets = {"none": None, "middle": (sizes[0] + sizes[-1]) // 2 + shared, "tight": int(1.1 * sizes[0]) + shared}
        for budget_name, budget in budgets.items():
            fit = [p for p, e in estimates.items() if budget is None or e.device_bytes + shared <= budget]
            good = [p for p in fit if estimates[p].kl <= DEFAULT_KL] or fit
            times = sorted(found[p][0] for p in good)
            for slo_name, slo in (
                ("none", None),
                ("1.1 x best", 1.1 * times[0]),
                ("median", times[len(times) // 2]),
                ("half of best", times[0] / 2),
            ):
                settings = base
                if budget is not None:
                    settings = settings.replace(gpu_memory=budget)
                if slo is not None:
                    settings = settings.replace(slo=slo)
                chosen = Planner(settings, shape, calibration, profile).plan(context)
                plan = chosen.layers[0][0]
                took = found[plan][0] if plan in found else float("nan")
                in_time = [p for p in good if slo is None or found[p][0] <= slo]
                least = min((found[p][1] for p in in_time), default=None)
                cases.append(
                    {
                        "context": context, "budget": budget_name, "SLO": slo_name, "plan": " + ".join(plan.names()[::2]),
                        "SLO ms": None if slo is None else 1e3 * slo, "ms": 1e3 * took, "best ms": 1e3 * times[0],
                        "met": None if slo is None else took <= slo, "can be met": None if slo is None else bool(in_time),
                        "warned": bool(chosen.warnings), "x best time": took / times[0],
                        "x least bytes": None if least is None else found[plan][1] / least,
                        "in budget": budget is None or chosen.device_bytes <= budget,
                    }
                )  # fmt: skip
    return cases, measured_rows


def summary(cases: list[dict[str, Any]], plans: list[dict[str, Any]]) -> dict[str, Any]:
    """The grid in a line."""
    possible = [case for case in cases if case["can be met"]]
    impossible = [case for case in cases if case["can be met"] is False]
    free = [case["x best time"] for case in cases if case["SLO ms"] is None]
    bytes_ = [case["x least bytes"] for case in possible if case["met"]]
    errors = torch.tensor([abs(p["predicted ms"] / p["measured ms"] - 1) for p in plans])
    return {
        "cases": len(cases), "SLO can be met": len(possible), "met": sum(case["met"] for case in possible),
        "cannot be met": len(impossible), "warned then": sum(case["warned"] for case in impossible),
        "within the budget": sum(case["in budget"] for case in cases),
        "time, x best (no SLO)": sum(free) / len(free), "bytes, x least": sum(bytes_) / max(1, len(bytes_)),
        "median error of the time %": 100 * float(errors.median()),
    }  # fmt: skip
