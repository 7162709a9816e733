"""Swept settings: their table, and figures over the swept fields."""

from __future__ import annotations

import itertools
import json
import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from eval.reporting import formatting
from eval.reporting.drawing import INK, Panel, Plot, canvas, cells, log_axis
from eval.reporting.load import Row
from eval.reporting.measures import BY_NAME, Measure, mean_of
from eval.reporting.tables import Table, average, numbers, overall

DEFAULT = "(default)"
SHOWN = ("evidence_recall", "kl")
#: Line colours, styles and marks of a figure's own: settings are no systems.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#882255", "#e69f00", "#56b4e9", "#666666", "#332288")
_MARKERS = "osD^vPX*"


def swept(rows: Sequence[Row]) -> dict[str, list[Any]]:
    """Fields with more than one value and their values, ascending where they are numbers."""
    values: dict[str, dict[str, Any]] = defaultdict(dict)
    names = dict.fromkeys(name for row in rows for name in row.setting)
    for row, name in itertools.product(rows, names):
        value = _value(row, name)
        values[name][json.dumps(value, sort_keys=True)] = value
    return {name: sorted(found.values(), key=_rank) for name, found in values.items() if len(found) > 1}


def ablation_table(rows: Sequence[Row], reference: Sequence[Row], metrics: dict[str, Measure]) -> Table:
    """One row per model, length, system and setting: quality, evidence recall, KL, tokens and time.

    Parameters
    ----------
    rows : sequence of Row
        With settings.
    reference : sequence of Row
        Of ``full``, for differences.
    metrics : dict
        Headline metric of each task.
    """
    fields = list(swept(rows)) or list(dict.fromkeys(name for row in rows for name in row.setting))
    table: Table = []
    for (model, length, system), group in _by(rows, "model", "length", "system").items():
        settings = _by(group, "setting_key")
        expected = [row for row in reference if (row.model, row.length) == (model, length)]
        for found in sorted(settings.values(), key=lambda one: [_rank(_value(one[0], name)) for name in fields]):
            line: dict[str, Any] = {"model": model, "length": length, "system": system}
            line |= {name: text(_value(found[0], name)) for name in fields}
            line["items"] = len(found)
            answer = overall(found, expected, metrics)
            line |= numbers("score", average(found, metrics), lambda value: 100 * value)
            line |= numbers("difference", answer[0] if answer else None, lambda value: 100 * value)
            for name in ("evidence_recall", "kl", "attended", "share", "seconds_per_token"):
                line |= numbers(name, mean_of(found, BY_NAME[name]), BY_NAME[name].shown)
            table.append(line)
    return table


def ablation_figures(rows: Sequence[Row]) -> list[Plot]:
    """Evidence recall and KL over the swept fields: heat maps where two fields were crossed, lines along every field."""
    plots = []
    for name in SHOWN:
        measure = BY_NAME[name]
        better = "dark" if measure.higher_is_better else "light"
        maps, lines = [], []
        for (model, length, system), group in _by(rows, "model", "length", "system").items():
            kept = [row for row in group if measure.get(row) is not None]
            fields = swept(kept)
            title = f"{model}, {formatting.length(length)} tokens, {system}"
            stem = f"ablation-{name}-{model}-{length}-{system}"
            if len(fields) > 1 and _crossed(kept, fields):
                maps += _maps(kept, fields, measure, title, stem)
            else:
                lines += _lines(kept, fields, measure, title, stem)
        unit = "%" if measure.kind == "points" else "nats"
        if maps:
            reading = f"{better.capitalize()} is better: each cell is the mean {measure.title} ({unit}) of one setting."
            plots.append(Plot(f"{name}-maps", f"Ablation: {measure.title}", reading, maps, width=340))
        if lines:
            up = "Up" if measure.higher_is_better else "Down"
            reading = f"{up} is better: mean {measure.title} ({unit}) along one field, the others held; bars are 95 % intervals."
            plots.append(Plot(f"{name}-lines", f"Ablation: {measure.title} field by field", reading, lines))
    return plots


def text(value: Any) -> str:
    """A setting's value in a few characters."""
    if isinstance(value, str):
        return value
    if isinstance(value, dict) and "kind" in value:
        rest = ", ".join(f"{key} {text(one)}" for key, one in value.items() if key != "kind")
        return f"{value['kind']} ({rest})" if rest else str(value["kind"])
    return f"{value:g}" if isinstance(value, float) else json.dumps(value)


def _value(row: Row, name: str) -> Any:
    return row.setting.get(name, DEFAULT)


def _rank(value: Any) -> tuple[int, float, str]:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return (0, float(value), "") if number else (1, 0.0, text(value))


def _by(rows: Sequence[Row], *names: str) -> dict[tuple[Any, ...], list[Row]]:
    found: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        found[tuple(getattr(row, name) for name in names)].append(row)
    return dict(found)


def _crossed(rows: Sequence[Row], fields: dict[str, list[Any]]) -> bool:
    """Whether most combinations of values were run, rather than one field at a time."""
    ran = len({tuple(text(_value(row, name)) for name in fields) for row in rows})
    return ran >= 0.6 * math.prod(len(values) for values in fields.values())


def _axes_of(fields: dict[str, list[Any]]) -> tuple[str, str, list[str]]:
    """The two fields for the axes, numbers and many values first; panels for the rest."""
    ranked = sorted(fields, key=lambda name: (any(_rank(value)[0] for value in fields[name]), -len(fields[name])))
    return ranked[0], ranked[1], ranked[2:]


def _maps(rows: Sequence[Row], fields: dict[str, list[Any]], measure: Measure, title: str, stem: str) -> list[Panel]:
    across, down, rest = _axes_of(fields)
    found: dict[tuple[str, ...], float] = {}
    groups: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in rows:
        groups[tuple(text(_value(row, name)) for name in (across, down, *rest))].append(row)
    for key, group in groups.items():
        mean = mean_of(group, measure)
        assert mean is not None
        found[key] = measure.shown(mean.mean)
    logarithmic = measure.kind == "nats"
    # KL spans decades; a floor keeps an exact setting on the scale.
    positive = [value for value in found.values() if value > 0]
    colours = {
        key: np.log10(max(value, min(positive, default=1.0))) if logarithmic else value for key, value in found.items()
    }
    low, high = min(colours.values()), max(colours.values())
    panels = []
    for number, combination in enumerate(itertools.product(*(fields[name] for name in rest))):
        fixed = tuple(text(value) for value in combination)
        grid = np.full((len(fields[down]), len(fields[across])), np.nan)
        values = grid.copy()
        for row, column in np.ndindex(*grid.shape):
            key = (text(fields[across][column]), text(fields[down][row]), *fixed)
            grid[row, column], values[row, column] = colours.get(key, np.nan), found.get(key, np.nan)
        if np.isnan(grid).all():
            continue
        figure, axes = canvas(1.7 + 0.72 * grid.shape[1], 0.9 + 0.36 * grid.shape[0])
        columns, lines = ([text(value) for value in fields[name]] for name in (across, down))
        texts = [[formatting.value(measure.kind, value) for value in line] for line in values]
        cells(axes, grid, columns, lines, (low, max(high, low + 1e-9)), texts)
        axes.set_xlabel(across)
        axes.set_ylabel(down)
        extra = "".join(f", {name} = {value}" for name, value in zip(rest, fixed, strict=True))
        panels.append(Panel(f"{stem}-{number}", title + extra, figure))
    return panels


def _lines(rows: Sequence[Row], fields: dict[str, list[Any]], measure: Measure, title: str, stem: str) -> list[Panel]:
    panels = []
    for name, values in fields.items():
        others = [other for other in fields if other != name]
        lines: dict[tuple[str, ...], list[tuple[int, float, float, float]]] = defaultdict(list)
        for place, value in enumerate(values):
            groups: dict[tuple[str, ...], list[Row]] = defaultdict(list)
            for row in rows:
                if text(_value(row, name)) == text(value):
                    groups[tuple(text(_value(row, other)) for other in others)].append(row)
            for key, group in groups.items():
                found = mean_of(group, measure)
                assert found is not None
                mean, low, high = (measure.shown(one) for one in (found.mean, found.low, found.high))
                lines[key].append((place, mean, low, high))
        drawn = {key: line for key, line in lines.items() if len(line) > 1}
        if not drawn:
            continue
        numeric = not any(_rank(value)[0] for value in values)
        spaced = numeric and min(values) > 0 and max(values) / min(values) >= 8
        figure, axes = canvas()
        for number, (key, line) in enumerate(drawn.items()):
            colour = _COLOURS[number % len(_COLOURS)]
            xs = [float(values[place]) if numeric else place for place, *_ in line]
            ys = [mean for _, mean, _, _ in line]
            label = ", ".join(f"{other} = {one}" for other, one in zip(others, key, strict=True))
            for x, (_, _, low, high) in zip(xs, line, strict=True):
                axes.plot([x, x], [low, high], color=colour, lw=1.2, alpha=0.45)
            axes.plot(xs, ys, marker=_MARKERS[number % len(_MARKERS)], color=colour, lw=1.8, label=label or None)
        if spaced:
            axes.set_xscale("log")
        if numeric:
            axes.set_xticks([float(value) for value in values], [text(value) for value in values])
            axes.minorticks_off()
        else:
            axes.set_xticks(range(len(values)), [text(value) for value in values])
        if measure.kind == "nats" and all(mean > 0 for line in drawn.values() for _, mean, _, _ in line):
            axes.set_yscale("log")
            means = [mean for line in drawn.values() for _, mean, _, _ in line]
            log_axis(axes.yaxis, lambda value, _: formatting.nats(value), means)
        if len(drawn) > 1:
            axes.legend(fontsize=8, frameon=False, labelcolor=INK, loc="upper left", bbox_to_anchor=(1.01, 1))
        axes.set_xlabel(name)
        axes.set_ylabel(measure.title + (" (%)" if measure.kind == "points" else " (nats)"))
        panels.append(Panel(f"{stem}-{name}", f"{title}: {name}", figure))
    return panels
