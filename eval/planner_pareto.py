"""Divergence from full attention against time per token: the planner's settings among all fixed ones of the ablation."""

from __future__ import annotations

import itertools
import os
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from alaya_hf import AlayaCache, AlayaConfig
from alaya_hf.cache_argument import cache_argument
from alaya_hf.cli.calibrate import calibrate
from alaya_hf.planner import ModelShape
from alaya_hf.planner.calibration import Calibration, save_calibration
from eval.fidelity import prefill, reference

#: Steps that are not timed: they build indexes.
WARM = 2
_RESAMPLES = 500
_PRESETS = ("full", "alaya", "alaya_block_means", "topk", "quest", "infllm", "streaming_llm")


def fixed(
    betas: Sequence[float] = (10, 20, 35, 70), windows: Sequence[int] = (64, 256, 512),
    indexes: Sequence[str] = ("flat", "quantized", "graph"), presets: Sequence[str] = _PRESETS,
) -> dict[str, AlayaConfig]:  # fmt: skip
    """Configurations that say everything themselves: those of ``configs/ablations/beta_window_index.yaml``, and presets."""
    found = {
        f"beta {beta:g}, window {local}, {index}": AlayaConfig(
            query={"kind": "dipr", "beta": beta}, index=index, window=(64, local), min_context=0
        )
        for local, beta, index in itertools.product(windows, betas, indexes)
    }
    return {**found, **{name: AlayaConfig.preset(name).replace(min_context=0) for name in presets}}


def planned(recoveries: Sequence[float], kls: Sequence[float]) -> dict[str, AlayaConfig]:
    """Configurations with one target each; everything else is the planner's."""
    base = AlayaConfig()
    return {
        **{f"planner, recovery {r:g}": base.replace(recovery=r) for r in recoveries},
        **{f"planner, KL {k:g}": base.replace(kl=k) for k in kls},
    }


@dataclass
class Track:
    """What one configuration did: KL of every step, seconds of every timed step, over all documents."""

    kl: list[float] = field(default_factory=list)
    top1: list[bool] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    retrieved: list[float] = field(default_factory=list)
    moves: int = 0
    plans: int = 1


@torch.no_grad()
def tracks(
    network: Any, texts: Sequence[Sequence[int]], steps: int, systems: dict[str, AlayaConfig],
    advance: Callable[[], Any] | None = None,
) -> dict[str, Track]:  # fmt: skip
    """Every configuration over the same tokens, one step of each in turn.

    Parameters
    ----------
    texts : sequence of sequence of int
        Token ids; the last `steps` of each are fed one by one.

    Notes
    -----
    Every step goes to all configurations, in an order drawn anew, before the next one: whatever else the machine does meets all
    of them alike, and times and divergences are compared step by step.
    """
    network.set_attn_implementation("alaya")
    found = {name: Track() for name in systems}
    order, names = random.Random(0), list(systems)
    for ids in texts:
        sequence = torch.tensor([list(ids)], device=network.device)
        expected = reference(network, sequence, steps)
        first = prefill(network, sequence[:, :-steps], AlayaConfig(window=(64, 256), min_context=0), False)
        caches: dict[str, AlayaCache] = {}
        shared: dict[Any, AlayaCache] = {}
        for name, settings in systems.items():
            # What has the same window shares the offloaded context and its indexes.
            key = settings.window, settings.store_dtype
            if key not in shared:
                shared[key] = first.fork(AlayaConfig(window=settings.window, min_context=0))
            caches[name] = (first if settings.plans else shared[key]).fork(settings)
        for step in range(steps):
            order.shuffle(names)
            for name in names:
                cache, track = caches[name], found[name]
                cache._last_step = None  # the time in between is the others'
                began = time.perf_counter()
                logits = network(
                    input_ids=sequence[:, -steps + step : sequence.shape[1] - steps + step + 1], **cache_argument(cache)
                ).logits[0, -1]
                took = time.perf_counter() - began
                given = logits.float().log_softmax(dim=-1)
                track.kl.append(float((expected[step].exp() * (expected[step] - given)).sum()))
                track.top1.append(bool(expected[step].argmax() == given.argmax()))
                if step >= WARM:
                    track.seconds.append(took)
            if advance is not None:
                advance()
        for name, cache in caches.items():
            found[name].retrieved.append(cache.stats()["retrieved"])
            if cache.keeper is not None and cache.keeper.plan is not None:
                found[name].moves += cache.keeper.moves
                found[name].plans = len({plan.names() for plan, _ in cache.keeper.plan.layers})
    return found


def surely_less(a: Sequence[float], b: Sequence[float], middle: Callable[[Sequence[float]], float]) -> bool:
    """Whether `a` is less than `b`, paired, in 97.5 % of the resamples of their pairs."""
    chance, n = random.Random(0), len(a)
    less = 0
    for _ in range(_RESAMPLES):
        chosen = chance.choices(range(n), k=n)
        less += middle([a[i] - b[i] for i in chosen]) < 0
    return less >= 0.975 * _RESAMPLES


def table(found: dict[str, Track], promised: set[str]) -> list[dict[str, Any]]:
    """One row per configuration, by time; who is on the front of the fixed ones, and who is beaten by whom.

    Parameters
    ----------
    promised : set of str
        The planner's configurations.

    Returns
    -------
    list of dict
        ``beaten by``: fixed configurations whose median time and mean KL are both less; ``surely``: of those, the ones for which
        both differences, step by step, hold in 97.5 % of bootstrap resamples.
    """
    time_of = {name: statistics.median(track.seconds) for name, track in found.items()}
    kl_of = {name: sum(track.kl) / len(track.kl) for name, track in found.items()}
    rows = []
    for name in sorted(found, key=time_of.__getitem__):
        track = found[name]
        beaten = [
            other
            for other in found
            if other not in promised and other != name and time_of[other] < time_of[name] and kl_of[other] < kl_of[name]
        ]
        surely = [
            other
            for other in beaten
            if surely_less(found[other].seconds, track.seconds, statistics.median)
            and surely_less(found[other].kl, track.kl, statistics.fmean)
        ]
        ordered = sorted(track.seconds)
        rows.append(
            {
                "configuration": name, "planner": name in promised, "ms per token": 1e3 * time_of[name],
                "95th percentile ms": 1e3 * ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))], "KL": kl_of[name],
                "same top token %": 100 * sum(track.top1) / len(track.top1),
                "retrieved": sum(track.retrieved) / len(track.retrieved), "plans": track.plans, "moves": track.moves,
                "on the front": not beaten, "beaten by": "; ".join(sorted(beaten)), "surely": "; ".join(sorted(surely)),
            }
        )  # fmt: skip
    return rows


def measured_costs(network: Any, folder: Path) -> Calibration:
    """Calibrate for a model on this machine, into a file that its caches read from then on."""
    shape = ModelShape.from_config(network.config, next(network.parameters()).dtype, network.device.type)
    costs = calibrate(shape)
    save_calibration(costs, folder / "calibration.json")
    os.environ["ALAYA_HF_CALIBRATION"] = str(folder / "calibration.json")
    return costs


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """KL against milliseconds per token: fixed configurations, their front, and the planner's."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    least = 1e-9
    figure, axis = plt.subplots(figsize=(9.5, 5.5))
    kinds = {"flat": "v", "quantized": "o", "graph": "^"}
    plain = [row for row in rows if not row["planner"]]
    for kind, marker in {**kinds, "preset": "s"}.items():
        here = [
            r
            for r in plain
            if (r["configuration"].rpartition(", ")[2] if ", " in r["configuration"] else "preset") == kind
        ]
        axis.scatter(
            [r["ms per token"] for r in here], [max(least, r["KL"]) for r in here], marker=marker, s=28, alpha=0.7,
            label=f"fixed, {kind}" if kind in kinds else "presets",
        )  # fmt: skip
    front = sorted((r["ms per token"], max(least, r["KL"])) for r in plain if r["on the front"])
    axis.step(
        [x for x, _ in front], [y for _, y in front], where="post", color="grey", lw=1, label="front of the fixed"
    )
    ours = [row for row in rows if row["planner"]]
    axis.scatter(
        [r["ms per token"] for r in ours], [max(least, r["KL"]) for r in ours], marker="*", s=130, color="crimson",
        label="planner", zorder=3,
    )  # fmt: skip
    for row in [*ours, *(r for r in plain if "," not in r["configuration"])]:
        text = row["configuration"].removeprefix("planner, ")
        axis.annotate(
            text, (row["ms per token"], max(least, row["KL"])), fontsize=7, xytext=(4, 3), textcoords="offset points"
        )
    axis.set_yscale("log")
    axis.set_xlabel("median time per token (ms)")
    axis.set_ylabel("KL to full attention (nats per token)")
    axis.grid(True, which="major", alpha=0.25)
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.02, 0.5))
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
