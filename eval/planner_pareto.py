"""Quality against time per token: the planner's settings among all fixed ones of the ablation."""

from __future__ import annotations

import itertools
import math
import os
import random
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import Cache

from alaya_hf import AlayaCache, AlayaConfig
from alaya_hf.cache_argument import cache_argument
from alaya_hf.cli.calibrate import calibrate
from alaya_hf.planner import ModelShape
from alaya_hf.planner.calibration import Calibration, load_calibration, save_calibration
from alaya_hf.probes import Probe
from eval.fidelity import reference
from eval.systems import Context, System

#: Steps that are not timed, by device: they build indexes; on a GPU they also bring buffers to their size and capture the step,
#: after two steps in a row over the same buffers.
WARM = {"cpu": 2, "cuda": 8}
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
    """What one configuration did: KL of every step, seconds of every timed step, over all documents.

    ``engine`` says who drove its layers (``stock``: one of Transformers' own caches), ``replays`` how many steps were replays of
    a CUDA graph. ``retrieved`` is empty on a GPU, where a probe would keep steps out of graphs.
    """

    kl: list[float] = field(default_factory=list)
    top1: list[bool] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    retrieved: list[float] = field(default_factory=list)
    moves: int = 0
    plans: int = 1
    engine: str = ""
    replays: int = 0

    def note(self, cache: Cache) -> None:
        """Take over what a cache says of itself after its last step."""
        if not isinstance(cache, AlayaCache):
            self.engine = "stock"
            return
        self.engine = " + ".join(sorted({layer.config.engine for layer in cache.alaya_layers}))
        stats = cache.stats()
        self.replays += stats["replays"]
        if stats.get("retrieved") is not None:
            self.retrieved.append(stats["retrieved"])
        if cache.keeper is not None and cache.keeper.plan is not None:
            self.moves += cache.keeper.moves
            self.plans = len({plan.names() for plan, _ in cache.keeper.plan.layers})


def _now(device: torch.device) -> float:
    """Seconds, once the device is through with its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@torch.no_grad()
def tracks(
    network: Any, texts: Sequence[Sequence[int]], steps: int, systems: Sequence[System],
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
    found = {system.name: Track() for system in systems}
    order, names, device = random.Random(0), list(found), network.device
    warm = WARM[device.type]
    for ids in texts:
        sequence = torch.tensor([list(ids)], device=device)
        expected = reference(network, sequence, steps)
        context = Context.for_systems(network, sequence[:, :-steps], (64, 256), systems)
        caches = {system.name: system.cache(context) for system in systems}
        for cache in caches.values():
            if device.type != "cuda" and isinstance(cache, AlayaCache):
                for layer in cache.alaya_layers:
                    layer.probe = Probe()
        for step in range(steps):
            order.shuffle(names)
            for name in names:
                cache, track = caches[name], found[name]
                if isinstance(cache, AlayaCache):
                    cache._last_step = None  # the time in between is the others'
                began = _now(device)
                logits = network(
                    input_ids=sequence[:, -steps + step : sequence.shape[1] - steps + step + 1], **cache_argument(cache)
                ).logits[0, -1]
                took = _now(device) - began
                given = logits.float().log_softmax(dim=-1)
                track.kl.append(float((expected[step].exp() * (expected[step] - given)).sum()))
                track.top1.append(bool(expected[step].argmax() == given.argmax()))
                if step >= warm:
                    track.seconds.append(took)
            if advance is not None:
                advance()
        for name, cache in caches.items():
            found[name].note(cache)
    return found


def surely_less(a: Sequence[float], b: Sequence[float], middle: Callable[[Sequence[float]], float]) -> bool:
    """Whether `a` is less than `b`, paired, in 97.5 % of the resamples of their pairs."""
    chance, n = random.Random(0), len(a)
    less = 0
    for _ in range(_RESAMPLES):
        chosen = chance.choices(range(n), k=n)
        less += middle([a[i] - b[i] for i in chosen]) < 0
    return less >= 0.975 * _RESAMPLES


def compared(
    found: Mapping[str, Track], losses: Mapping[str, Sequence[float]], promised: Collection[str]
) -> list[dict[str, Any]]:
    """One row per configuration, by time; who is on the front of the fixed ones, and who is beaten by whom.

    Parameters
    ----------
    found : mapping of str to Track
        Times, paired by step.
    losses : mapping of str to sequence of float
        What is lost in quality, less is better, paired by step or item; means are compared.
    promised : collection of str
        The planner's configurations.

    Returns
    -------
    list of dict
        ``beaten by``: fixed configurations whose median time and mean loss are both less; ``surely``: of those, the ones for
        which both differences, pair by pair, hold in 97.5 % of bootstrap resamples; ``equalled by``: faster ones that lose as
        much. On the front is what has neither.
    """
    time_of = {name: statistics.median(track.seconds) for name, track in found.items()}
    loss_of = {name: statistics.fmean(losses[name]) for name in found}
    rows = []
    for name in sorted(found, key=time_of.__getitem__):
        beaten = [
            other
            for other in found
            if other not in promised
            and other != name
            and time_of[other] < time_of[name]
            and loss_of[other] < loss_of[name]
        ]
        surely = [
            other
            for other in beaten
            if surely_less(found[other].seconds, found[name].seconds, statistics.median)
            and surely_less(losses[other], losses[name], statistics.fmean)
        ]
        equal = [
            other
            for other in found
            if other not in promised
            and time_of[other] < time_of[name]
            and math.isclose(loss_of[other], loss_of[name], rel_tol=0, abs_tol=1e-9)
        ]
        ordered = sorted(found[name].seconds)
        rows.append(
            {
                "configuration": name, "planner": name in promised, "ms per token": 1e3 * time_of[name],
                "95th percentile ms": 1e3 * ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))],
                "on the front": not beaten and not equal, "equalled by": "; ".join(sorted(equal)),
                "beaten by": "; ".join(sorted(beaten)), "surely": "; ".join(sorted(surely)),
            }
        )  # fmt: skip
    return rows


def with_columns(row: dict[str, Any], columns: dict[str, Any]) -> dict[str, Any]:
    """A row of :func:`compared` with more columns before the last four, its verdict."""
    return {**dict(list(row.items())[:-4]), **columns, **dict(list(row.items())[-4:])}


def table(found: dict[str, Track], promised: set[str]) -> list[dict[str, Any]]:
    """:func:`compared` by KL, with what else the steps said of the configurations."""
    rows = []
    for row in compared(found, {name: track.kl for name, track in found.items()}, promised):
        track = found[row["configuration"]]
        columns = {
            "KL": statistics.fmean(track.kl), "same top token %": 100 * statistics.fmean(track.top1),
            "retrieved": statistics.fmean(track.retrieved) if track.retrieved else None, "engine": track.engine,
            "replays": track.replays, "plans": track.plans, "moves": track.moves,
        }  # fmt: skip
        rows.append(with_columns(row, columns))
    return rows


def shape_of(network: Any) -> ModelShape:
    """What the planner has to know of a loaded model."""
    return ModelShape.from_config(network.config, next(network.parameters()).dtype, network.device.type)


def measured_costs(network: Any, folder: Path, again: bool = True) -> Calibration:
    """Calibrate for a model on this machine, into a file that its caches read from then on; if not `again`, once a folder."""
    path, shape = folder / "calibration.json", shape_of(network)
    costs = load_calibration(shape, path) if path.exists() and not again else calibrate(shape)
    save_calibration(costs, path)
    os.environ["ALAYA_HF_CALIBRATION"] = str(path)
    return costs


def plot(
    rows: Sequence[dict[str, Any]],
    path: Path,
    quality: str = "KL",
    label: str = "KL to full attention (nats per token)",
) -> None:
    """A quality against milliseconds per token: fixed configurations, their front, and the planner's.

    Parameters
    ----------
    rows : sequence of dict
        As :func:`compared` makes them.
    path : Path
        Of the picture.
    quality : str
        The rows' column; a KL is drawn on a logarithmic axis.
    label : str
        Of the vertical axis.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    logarithmic = quality == "KL"

    def height(row: dict[str, Any]) -> float:
        return max(1e-9, row[quality]) if logarithmic else row[quality]

    figure, axis = plt.subplots(figsize=(9.5, 5.5))
    kinds = {"flat": "v", "quantized": "o", "graph": "^"}
    plain = [row for row in rows if not row["planner"]]
    for number, (kind, marker) in enumerate({**kinds, "preset": "s"}.items()):
        here = [
            r
            for r in plain
            if (r["configuration"].rpartition(", ")[2] if ", " in r["configuration"] else "preset") == kind
        ]
        if here:
            axis.scatter(
                [r["ms per token"] for r in here], [height(r) for r in here], marker=marker, s=28, alpha=0.7,
                color=f"C{number}", label=f"fixed, {kind}" if kind in kinds else "presets",
            )  # fmt: skip
    slowest = max(row["ms per token"] for row in rows)
    front = sorted((r["ms per token"], height(r)) for r in plain if r["on the front"])
    front += [(slowest, y) for _, y in front[-1:]]
    axis.step(
        [x for x, _ in front], [y for _, y in front], where="post", color="grey", lw=1, label="front of the fixed"
    )
    ours = [row for row in rows if row["planner"]]
    axis.scatter(
        [r["ms per token"] for r in ours], [height(r) for r in ours], marker="*", s=130, color="crimson",
        label="planner", zorder=3,
    )  # fmt: skip
    for row in [*ours, *(r for r in plain if "," not in r["configuration"])]:
        text = row["configuration"].removeprefix("planner, ")
        # Scores are often equal: leaning texts stay apart.
        axis.annotate(
            text, (row["ms per token"], height(row)), fontsize=7, xytext=(4, 3), textcoords="offset points",
            rotation=0 if logarithmic else 40,
        )  # fmt: skip
    if logarithmic:
        axis.set_yscale("log")
    else:
        axis.margins(y=0.15)
    if slowest > 8 * min(row["ms per token"] for row in rows):
        axis.set_xscale("log")
    axis.set_xlabel("median time per token (ms)")
    axis.set_ylabel(label)
    axis.grid(True, which="major", alpha=0.25)
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.02, 0.5))
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
