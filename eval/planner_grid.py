"""The planner's choices against an exhaustive search over the same plans, every one of them measured."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alaya_hf import AlayaConfig
from alaya_hf.errors import AlayaError, BudgetError
from alaya_hf.planner import ModelShape, Planner
from alaya_hf.planner.calibration import Calibration
from alaya_hf.planner.candidates import candidates, windows
from alaya_hf.planner.layer_plan import LayerPlan
from alaya_hf.planner.measure_host import sample_layer
from alaya_hf.planner.model_plan import shared_key
from alaya_hf.planner.plan_model import DEFAULT_KL
from alaya_hf.planner.profile import ALPHAS, RECOVERIES, HeadGroup, Profile, load_profile

#: SLOs, as multiples of what attention takes at best; the last one is out of reach.
SLOS = (1.1, 1.25, 1.5, 2.0, 0.5)
#: Budgets, from the least with which the KL can be kept (0) to what the largest plan takes (1); None: no budget.
BUDGETS = {"none": None, "middle": 0.5, "tight": 0.05}
_REPEATS = 40


@dataclass(frozen=True)
class Measured:
    """One layer's decode steps under a plan.

    Attributes
    ----------
    seconds, tail : float
        Median and 95th percentile.
    error : float or None
        Relative error of the output against exact attention; None where that was not looked at.
    fetched : float or None
        Tokens read from the store, per KV head.
    layer_bytes, shared_bytes : int or None
        Allocated on the device for a layer, and once for all layers; None: as estimated.
    """

    seconds: float
    tail: float
    error: float | None = None
    fetched: float | None = None
    layer_bytes: int | None = None
    shared_bytes: int | None = None


Measure = Callable[[LayerPlan], Measured]


def tail(times: Sequence[float]) -> float:
    """95th percentile."""
    ordered = sorted(times)
    return ordered[min(len(ordered) - 1, math.ceil(0.95 * len(ordered)) - 1)]


def on_host(shape: ModelShape, tokens: int) -> tuple[Measure, Profile]:
    """How plans of the host engine are measured at a context, and the profile of the keys that they are measured on."""
    from alaya_hf.cli.calibrate import host_step

    def measure(plan: LayerPlan) -> Measured:
        settings = AlayaConfig(
            query=plan.query, index=plan.index, residual=plan.residual, window=plan.window, min_context=0
        )
        times, fetched = host_step(settings, shape, tokens)
        return Measured(statistics.median(times), tail(times), None, fetched)

    kv, q = sample_layer(shape, tokens)
    return measure, sample_profile(kv[:, :, 0], q, shape, load_profile())


def on_device(shape: ModelShape, tokens: int) -> tuple[Measure, Profile]:
    """The same for the device engine: steps of several layers in one CUDA graph, and what they allocate."""
    from alaya_hf.engine.device.plan import device_plan
    from alaya_hf.kernels.gpu.store_format import StoreFormat
    from alaya_hf.planner.device_case import DeviceContext, graph_times, sample_context

    keys, values, q = sample_context(shape, tokens)
    context = DeviceContext(keys, values, q, StoreFormat(shape.head_dim, shape.dtype))
    exact = context.exact()

    def measure(plan: LayerPlan) -> Measured:
        asked = device_plan(AlayaConfig(**plan.settings()), 0)
        bits = asked.key_bits, asked.value_bits
        cases = context.cases(bits, asked.cap, asked.beta(shape.head_dim**-0.5), asked.ratio)
        error = context.error(cases[0].step(), exact)
        if not math.isfinite(error):
            raise FloatingPointError("the output is not finite")
        fetched = cases[0].fetched
        times = graph_times([case.step for case in cases], _REPEATS)
        held = device_layer_bytes(plan, shape, tokens)
        return Measured(statistics.median(times), tail(times), error, fetched, held, cases[0].work.nbytes)

    return measure, sample_profile(keys[0], q.view(shape.kv_heads, shape.group, -1).float(), shape, load_profile())


def device_layer_bytes(plan: LayerPlan, shape: ModelShape, tokens: int) -> int:
    """What the engine's own buffers of a layer take at a context: they are made and counted, and empty."""
    from alaya_hf.engine.device.plan import device_plan
    from alaya_hf.engine.device.tokens import DeviceTokens

    layout = device_plan(AlayaConfig(**plan.settings()), 0).layout(shape.head_dim)
    device = torch.device(_buffers_on(shape))
    made = DeviceTokens(1, shape.kv_heads, layout, plan.window, plan.min_context, shape.dtype, device)  # type: ignore[arg-type]
    made.reserve(0, made._low_for(tokens, tokens))
    return made.window_bytes + made.lowbit_bytes


def _buffers_on(shape: ModelShape) -> str:
    return shape.device


def check(shape: ModelShape, tokens: int = 4096) -> float:
    """Largest relative error of a device step that keeps nearly everything, over the low-bit copies; a first look at the kernels.

    Raises
    ------
    ArithmeticError
        If it is above 5 %.
    """
    from alaya_hf.kernels.gpu.store_format import StoreFormat
    from alaya_hf.planner.device_case import DeviceContext, sample_context

    keys, values, q = sample_context(shape, tokens)
    context = DeviceContext(keys, values, q, StoreFormat(shape.head_dim, shape.dtype), 1)
    exact = context.exact()
    errors = {
        bits: context.error(context.cases(bits, 512, math.inf, 0.9999)[0].step(), exact) for bits in ((4, 4), (4, 2))
    }
    if not all(error <= 0.05 for error in errors.values()):
        raise ArithmeticError(
            f"expected steps of the device engine within 5 % of exact attention over {tokens} tokens, got {errors}. Nothing was "
            "measured: run the GPU tests first (make test-gpu)."
        )
    return max(errors.values())


def sample_profile(keys: Tensor, q: Tensor, shape: ModelShape, shipped: Profile) -> Profile:
    """A profile of the very layer that is measured, so that times are judged and not the spread of its attention.

    Parameters
    ----------
    keys : Tensor ``[kv_heads, tokens, head_dim]``
    q : Tensor ``[kv_heads, group, head_dim]`` float32
    shipped : Profile
        Whose KL per recovery is used.
    """
    context, window, scaling = keys.shape[1], AlayaConfig().window, shape.head_dim**-0.5
    logits = torch.stack([q[h] @ keys[h].float().T for h in range(shape.kv_heads)]) * scaling
    inside = slice(window.init, context - window.local)
    lse = logits.logsumexp(-1, keepdim=True)
    outside = (logits - lse).exp()[:, :, inside]
    held = 1 - outside.sum(-1)
    sums = held.unsqueeze(-1) + outside.sort(dim=-1, descending=True).values.double().cumsum(-1).float()
    wanted = torch.tensor(RECOVERIES, device=q.device).expand(*held.shape, len(RECOVERIES)).contiguous()
    needed = torch.where(wanted <= held.unsqueeze(-1), 0, torch.searchsorted(sums, wanted) + 1).float()
    needed = needed.clamp(max=outside.shape[-1]).cpu()
    ranges = {}
    unions = []
    for alpha in ALPHAS:
        cut = logits[:, :, inside] >= logits.amax(-1, keepdim=True) + math.log(alpha)
        ranges[alpha] = cut.sum(-1).float().cpu(), (held + torch.where(cut, outside, 0.0).sum(-1)).cpu()
        unions.append(float(cut.any(1).sum(-1).float().mean() / cut.sum(-1).float().mean().clamp(min=1e-9)))
    groups = tuple(
        HeadGroup(
            float(held[h].mean()), tuple(needed[h].mean(0).tolist()),
            {alpha: (float(tokens[h].mean()), float(share[h].mean())) for alpha, (tokens, share) in ranges.items()},
        )
        for h in range(shape.kv_heads)
    )  # fmt: skip
    return Profile("the layer measured", context, shape.group, max(1.0, unions[2]), (groups,), shipped.plans)


class _Space:
    """All plans of one context, measured, and every assignment of up to two of them to the layers of a model."""

    def __init__(self, planner: Planner, found: dict[LayerPlan, Measured], context: int) -> None:
        shape, room = planner.shape, planner.room_for(context)
        self.plans, self.found, self.layers = list(found), found, shape.layers
        # Bounds, which the budget is about; what is allocated is compared in the plans' table.
        estimates = [planner.estimate(plan, 0, context, 1, room) for plan in self.plans]
        wholes = [planner.estimate_all([plan] * self.layers, context, 1, room) for plan in self.plans]
        self.bytes = np.array([e.device_bytes for e in estimates])
        self.kls = np.array([e.kl for e in estimates])
        self.tails = np.array([found[plan].tail for plan in self.plans])
        self.shared = np.array([whole.workspace_bytes for whole in wholes])
        self.keys = [shared_key(plan) for plan in self.plans]
        n = len(self.plans)
        same = np.array([[a == b for b in self.keys] for a in self.keys])
        first = np.arange(self.layers + 1)[:, None, None]  # layers that run the first plan of a pair
        shared = np.where(
            same, np.maximum(self.shared[:, None], self.shared[None]), self.shared[:, None] + self.shared[None]
        )
        shared = np.broadcast_to(shared, (self.layers + 1, n, n)).copy()
        shared[0], shared[-1] = self.shared[None, :], self.shared[:, None]

        def mixed(x: np.ndarray) -> np.ndarray:
            return first * x[None, :, None] + (self.layers - first) * x[None, None, :]

        self.mix_bytes, self.mix_kls, self.mix_tails = mixed(self.bytes) + shared, mixed(self.kls), mixed(self.tails)

    def size(self, share: float) -> int:
        """A budget between the least that keeps the KL (0; without such a plan, the least there is) and the largest plan (1)."""
        good = self.mix_kls <= DEFAULT_KL * (1 + 1e-9)
        least = self.mix_bytes[good].min() if good.any() else self.mix_bytes.min()
        return math.ceil(least + share * (self.mix_bytes.max() - least))

    def best(self, budget: int | None, limit: float | None) -> tuple[float, int] | None:
        """Least time, and least bytes in time, of what keeps budget and KL; None: nothing does."""
        good = self.mix_kls <= DEFAULT_KL * (1 + 1e-9)
        if budget is not None:
            good &= self.mix_bytes <= budget
        if limit is not None:
            good &= self.mix_tails <= limit
        if not good.any():
            return None
        return float(self.mix_tails[good].min()), int(self.mix_bytes[good].min())


def measure_plans(
    plans: Iterable[LayerPlan], measure: Measure, advance: Callable[[str], Any] | None = None
) -> tuple[dict[LayerPlan, Measured], dict[LayerPlan, str]]:
    """Measure every plan; one that fails is noted with the reason and left out.

    Raises
    ------
    RuntimeError
        If the first three plans fail: nothing after them would come to more.
    """
    found: dict[LayerPlan, Measured] = {}
    failed: dict[LayerPlan, str] = {}
    for plan in plans:
        try:
            found[plan] = measure(plan)
        except (RuntimeError, ArithmeticError, AlayaError, MemoryError, ValueError, TypeError) as error:
            failed[plan] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            if not found and len(failed) >= 3:
                raise RuntimeError(f"the first three plans failed, the last one with {failed[plan]}") from error
        if advance is not None:
            advance(" + ".join(plan.names()[::2]))
    return found, failed


def grid(
    shape: ModelShape, calibration: Calibration, context: int, engine: str, measure: Measure, profile: Profile,
    advance: Callable[[str], Any] | None = None,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:  # fmt: skip
    """Cases of budget and SLO at one context.

    Parameters
    ----------
    shape : ModelShape
        Of a whole model; every layer is taken to be the one measured.
    engine : {"host", "device"}
    measure : callable
        Measures one layer under a plan.
    advance : callable, optional
        Told in words of every plan that was measured.

    Returns
    -------
    cases, plans : list of dict
        Per case the planner's choice and the best there is; per plan what was predicted and measured, or why it was not.

    Notes
    -----
    A model's attention takes the sum over its layers, and its 95th percentile the sum of the layers' ones. What a token takes
    besides attention is the same under every plan: the calibration's estimate of it is part of the SLO and of the time held
    against it. KL, estimated, has to stay within 0.001 nats. The best there is: every assignment of one or two of the plans to
    the layers, with what was measured.
    """
    base = AlayaConfig(planner="cost", engine=engine, kl=DEFAULT_KL, cuda_graphs="capture", min_context=0)
    planner = Planner(base, shape, calibration, profile)
    window, whole = windows(base)[0]
    found, failed = measure_plans(candidates(base, 0, shape, engine, window, whole), measure, advance)
    rows = [_plan_row(planner, plan, found.get(plan), failed.get(plan), context) for plan in [*found, *failed]]
    # With a budget, buffers are those of single tokens, and the same plans take fewer bytes.
    free, limited = (
        _Space(Planner(settings, shape, calibration, profile), found, context)
        for settings in (base, base.replace(gpu_memory=1 << 60))
    )
    outside = planner.estimate_all([free.plans[0]] * shape.layers, context, 1).base_seconds
    cases = []
    for budget_name, share in BUDGETS.items():
        budget = None if share is None else limited.size(share)
        space = free if share is None else limited
        fastest = space.best(budget, None)
        for factor in (None, *SLOS):
            case: dict[str, Any] = {
                "context": context, "budget": budget_name, "SLO": "none" if factor is None else f"{factor:g} x best",
            }  # fmt: skip
            cases.append(case)
            # Without a plan that keeps the KL the limit is one of the fastest that fits.
            least = fastest[0] if fastest is not None else float(space.tails.min()) * shape.layers
            limit = None if factor is None else factor * least
            settings = base if budget is None else base.replace(gpu_memory=budget)
            settings = settings if limit is None else settings.replace(slo=limit + outside)
            case.update(_judge(Planner(settings, shape, calibration, profile), space, context, budget, limit, outside))
    return cases, rows


def _plan_row(
    planner: Planner, plan: LayerPlan, measured: Measured | None, failure: str | None, context: int
) -> dict[str, Any]:
    estimate = planner.estimate(plan, 0, context, 1, planner.room_for(context))
    shared = planner.estimate_all([plan], context, 1).workspace_bytes
    row: dict[str, Any] = {
        "context": context, "query": plan.names()[0], "residual": plan.names()[2], "predicted ms": 1e3 * estimate.seconds,
        "measured ms": None, "95th percentile ms": None, "predicted / measured": None, "KL": estimate.kl * planner.shape.layers,
        "predicted tokens": estimate.fetched, "tokens": None, "error": None, "bound MiB": estimate.device_bytes / 2**20,
        "MiB": None, "bound / allocated": None, "shared bound MiB": shared / 2**20, "shared MiB": None, "failed": failure or "",
    }  # fmt: skip
    if measured is not None:
        row |= {
            "measured ms": 1e3 * measured.seconds, "95th percentile ms": 1e3 * measured.tail,
            "predicted / measured": estimate.seconds / measured.seconds, "tokens": measured.fetched, "error": measured.error,
        }  # fmt: skip
        if measured.layer_bytes is not None and measured.shared_bytes is not None:
            row |= {
                "MiB": measured.layer_bytes / 2**20, "shared MiB": measured.shared_bytes / 2**20,
                "bound / allocated": (estimate.device_bytes + shared) / (measured.layer_bytes + measured.shared_bytes),
            }  # fmt: skip
    return row


def _judge(
    planner: Planner, space: _Space, context: int, budget: int | None, limit: float | None, outside: float
) -> dict[str, Any]:
    best = space.best(budget, None)
    in_time = space.best(budget, limit)
    row: dict[str, Any] = {
        "plans": "", "budget MiB": None if budget is None else budget / 2**20,
        "SLO ms": None if limit is None else 1e3 * (limit + outside), "95th percentile ms": None, "attention ms": None,
        "predicted ms": None, "best attention ms": None if best is None else 1e3 * best[0],
        "can be met": None if limit is None else in_time is not None, "met": None, "warned": None, "KL kept": None,
        "in budget": None, "x best time": None, "x least bytes": None, "failed": "",
    }  # fmt: skip
    try:
        chosen = planner.plan(context)
    except BudgetError as error:
        return row | {"failed": str(error)[:300]}
    counts: dict[LayerPlan, int] = {}
    for plan, _ in chosen.layers:
        counts[plan] = counts.get(plan, 0) + 1
    row |= {
        "plans": "; ".join(f"{n} x {' + '.join(plan.names()[::2])}" for plan, n in counts.items()),
        "warned": bool(chosen.warnings), "predicted ms": 1e3 * chosen.attention_seconds,
        "KL kept": chosen.kl <= DEFAULT_KL * (1 + 1e-6), "in budget": budget is None or chosen.device_bytes <= budget,
    }  # fmt: skip
    missing = [plan for plan in counts if plan not in space.found]
    if missing:
        return row | {"failed": f"chosen, but not measured: {missing[0].names()}", "met": False if limit else None}
    took = sum(n * space.found[plan].tail for plan, n in counts.items())
    row |= {
        "95th percentile ms": 1e3 * (took + outside), "attention ms": 1e3 * took,
        "met": None if limit is None else took <= limit and row["KL kept"] and row["in budget"],
        "x best time": None if best is None else took / best[0],
        "x least bytes": None if in_time is None or limit is None else chosen.device_bytes / in_time[1],
    }  # fmt: skip
    return row


def summary(cases: list[dict[str, Any]], plans: list[dict[str, Any]]) -> dict[str, Any]:
    """The grid in a line."""
    possible = [case for case in cases if case["can be met"]]
    impossible = [case for case in cases if case["can be met"] is False]
    free = [case["x best time"] for case in cases if case["SLO ms"] is None and case["x best time"] is not None]
    bytes_ = sorted(case["x least bytes"] for case in possible if case["met"] and case["x least bytes"] is not None)
    errors = [abs(p["predicted / measured"] - 1) for p in plans if p["predicted / measured"] is not None]
    nan = float("nan")
    return {
        "cases": len(cases), "SLO can be met": len(possible), "met": sum(bool(case["met"]) for case in possible),
        "met %": 100 * sum(bool(case["met"]) for case in possible) / len(possible) if possible else nan,
        "cannot be met": len(impossible), "warned then": sum(bool(case["warned"]) for case in impossible),
        "within the budget": sum(bool(case["in budget"]) for case in cases),
        "time, x best (no SLO)": statistics.fmean(free) if free else nan,
        "bytes, x least": statistics.fmean(bytes_) if bytes_ else nan, "bytes, worst": bytes_[-1] if bytes_ else nan,
        "within 1.2 x bytes": sum(x <= 1.2 for x in bytes_),
        "median error of the time %": 100 * statistics.median(errors) if errors else nan,
        "plans": len(plans), "plans that failed": sum(bool(p["failed"]) for p in plans),
    }  # fmt: skip
