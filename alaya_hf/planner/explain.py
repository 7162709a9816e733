"""A plan in words and numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from alaya_hf.planner.model_plan import ModelPlan
from alaya_hf.units import bytes_text, time_text

#: Columns that totals are sums of; the others are means over layers.
_SUMS = ("seconds", "device_bytes", "host_bytes", "moved_bytes")
_MEANS = ("tokens", "fetched", "recovery", "error")


@dataclass(frozen=True)
class Explanation:
    """What every layer does, and what that takes per decode step.

    Attributes
    ----------
    data : dict
        ``context``, ``batch``, ``targets``; per layer its plan, ``estimated`` and, if analysed, ``actual`` numbers; ``totals`` of
        both; ``warnings`` and ``sources``. Bytes are whole numbers, times seconds.
    """

    data: dict[str, Any]

    def json(self) -> str:
        """As text."""
        return json.dumps(self.data, indent=1)

    def __str__(self) -> str:
        return _text(self.data)

    __repr__ = __str__


def explain_plan(plan: ModelPlan, actual: tuple[dict[str, Any], Sequence[dict[str, Any]]] | None = None) -> Explanation:
    """A plan with its estimates, and what was measured beside them.

    Parameters
    ----------
    plan : ModelPlan
    actual : (dict, sequence of dict), optional
        ``stats()`` of the cache, and what each layer took: names as in :class:`~alaya_hf.planner.layer_plan.Estimate`, and
        ``error``.
    """
    layers = []
    for place, (layer, estimate) in enumerate(plan.layers):
        query, index, residual = layer.names()
        row: dict[str, Any] = {
            "layer": plan.shape.number(place), "engine": layer.engine, "query": query, "index": index, "residual": residual,
            "window": [layer.window.init, layer.window.local], "store_dtype": layer.store_dtype, "reason": layer.reason,
            "estimated": {name: getattr(estimate, name) for name in ("tokens", "fetched", "recovery", "kl", *_SUMS)},
        }  # fmt: skip
        if actual is not None:
            row["actual"] = actual[1][place]
        layers.append(row)
    totals: dict[str, Any] = {
        "estimated": {
            "tokens": sum(e.tokens for _, e in plan.layers) / len(plan.layers),
            "fetched": sum(e.fetched for _, e in plan.layers) / len(plan.layers),
            "recovery": plan.recovery, "kl": plan.kl, "seconds": plan.attention_seconds, "seconds_per_token": plan.seconds,
            "tail_per_token": plan.tail,
            "device_bytes": plan.device_bytes, "workspace_bytes": plan.workspace_bytes, "host_bytes": plan.host_bytes,
            "moved_bytes": sum(e.moved_bytes for _, e in plan.layers),
        }
    }  # fmt: skip
    if actual is not None:
        totals["actual"] = _totals(actual[0], actual[1])
    settings = plan.settings
    targets = {name: getattr(settings, name) for name in ("slo", "gpu_memory", "recovery", "kl", "planner")}
    return Explanation(
        {
            "context": plan.context, "room": plan.room, "batch": plan.batch, "cuda_graphs": plan.cuda_graphs,
            "targets": {name: value for name, value in targets.items() if value is not None},
            "layers": layers, "totals": totals, "warnings": list(plan.warnings), "sources": list(plan.sources),
        }
    )  # fmt: skip


def _totals(stats: dict[str, Any], layers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in (*_MEANS, *_SUMS):
        values = [row[name] for row in layers if row.get(name) is not None]
        if values:
            found[name] = sum(values) / (len(values) if name in _MEANS else 1)
    found["workspace_bytes"] = stats["workspace_bytes"]
    found["device_bytes"] = found.get("device_bytes", 0) + stats["workspace_bytes"]
    return found


def _text(data: dict[str, Any]) -> str:
    from io import StringIO

    from rich import box
    from rich.console import Console
    from rich.table import Table

    analysed = "actual" in data["totals"]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    names = ["tokens", "recovery", "time", "device", "host"]
    for name in ("layers", "engine", "query", "index", "residual", "window", *names):
        table.add_column(name, justify="right" if name in names else "left", no_wrap=True)
    table.add_column("why", overflow="fold")
    for group in _runs(data["layers"]):
        first, last = group[0], group[-1]
        label = str(first["layer"]) if len(group) == 1 else f"{first['layer']}-{last['layer']}"
        cells = _cells(group, "estimated", analysed)
        store = "" if first["store_dtype"] == "auto" else f", {first['store_dtype']}"
        table.add_row(
            label, first["engine"], first["query"], first["index"], first["residual"] + store,
            "+".join(map(str, first["window"])), *cells, first["reason"],
        )  # fmt: skip
    totals = data["totals"]["estimated"]
    table.add_section()
    table.add_row("all", "", "", "", "", "", *_cells([data["totals"]], "estimated", analysed, True), "")
    wanted = ", ".join(f"{name} {value}" for name, value in data["targets"].items()) or "no target"
    lines = [
        f"{data['batch']} x {data['context']} tokens, room for {data['room']}; {wanted}",
        f"per token {time_text(totals['seconds_per_token'])}, {time_text(totals['seconds'])} of it attention"
        + (f", 95th percentile {time_text(totals['tail_per_token'])}" if "slo" in data["targets"] else "")
        + "; about "
        f"{totals['kl']:.2g} nats from full attention"
        + ("; estimated / actual" if analysed else "")
        + "; rows of several layers show the mean of one",
    ]  # fmt: skip
    out = StringIO()
    Console(file=out, width=200, force_terminal=False).print(table)
    body = "\n".join(line.rstrip() for line in out.getvalue().splitlines())
    notes = [f"! {text}" for text in data["warnings"]] + [f"({text})" for text in data["sources"]]
    return "\n".join([*lines, body, *notes])


def _runs(layers: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Neighbouring layers with one plan."""
    keys = ("engine", "query", "index", "residual", "window", "store_dtype", "reason")
    runs: list[list[dict[str, Any]]] = []
    for row in layers:
        if runs and all(row[key] == runs[-1][-1][key] for key in keys) and row["layer"] == runs[-1][-1]["layer"] + 1:
            runs[-1].append(row)
        else:
            runs.append([row])
    return runs


def _cells(group: list[dict[str, Any]], side: str, analysed: bool, total: bool = False) -> list[str]:
    def mean(which: str, name: str) -> float | None:
        values = [row[which][name] for row in group if row.get(which, {}).get(name) is not None]
        return sum(values) / len(values) if values else None

    def both(name: str, show: Any) -> str:
        shown = []
        for which in (side, "actual") if analysed else (side,):
            value = mean(which, name)
            shown.append("-" if value is None or not math.isfinite(value) else show(value))
        return " / ".join(shown)

    return [
        both("tokens", lambda x: f"{x:.0f}"),
        both("recovery", lambda x: f"{x:.3f}"),
        both("seconds", time_text),
        both("device_bytes", bytes_text),
        both("host_bytes", bytes_text),
    ]
