"""The report's figures, one function each; a function returns None where the results hold nothing to draw."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator

from eval.reporting import formatting
from eval.reporting.drawing import INK, Panel, Plot, canvas, cells, label_margin, log_axis
from eval.reporting.load import Results, Row
from eval.reporting.measures import BY_NAME, Measure, mean_of
from eval.reporting.statistics import Estimate
from eval.reporting.systems import FULL, OURS, look, order
from eval.reporting.tables import overall

Point = tuple[float, Estimate, str, str]


def quality_against_attended(results: Results, metrics: dict[str, Measure]) -> Plot | None:
    """Mean difference to ``full`` in points, against tokens attended."""
    return _quality(
        results,
        metrics,
        "quality-attended",
        "Quality against tokens attended",
        "Up is better, left is cheaper: each mark is one system, its height the mean difference to full attention over the tasks "
        "(points; the dashed line is full attention), its place the tokens a head attends to exactly; bars are 95 % intervals.",
        "attended",
        "tokens attended exactly per head (log)",
        formatting.tokens,
    )


def quality_against_bytes(results: Results, metrics: dict[str, Measure]) -> Plot | None:
    """Mean difference to ``full`` in points, against device bytes."""
    return _quality(
        results,
        metrics,
        "quality-bytes",
        "Quality against device memory",
        "Up is better, left is cheaper: height is the mean difference to full attention over the tasks (points), place the bytes "
        "that have to lie beside the model as a share of all keys and values.",
        "device_share",
        "device bytes, % of all keys and values (log)",
        lambda value, _=None: f"{100 * value:.3g} %",
    )


def quality_against_time(results: Results, metrics: dict[str, Measure]) -> Plot | None:
    """Mean difference to ``full`` in points, against seconds per token, hardware by hardware."""
    return _quality(
        results,
        metrics,
        "quality-time",
        "Quality against time",
        "Up is better, left is faster: height is the mean difference to full attention over the tasks (points), place the time "
        "of one decoding step; times of one panel were taken on the same hardware.",
        "seconds_per_token",
        "time per token (log)",
        lambda value, _=None: formatting.seconds(value),
        per_hardware=True,
    )


def quality_by_task(results: Results, metrics: dict[str, Measure]) -> Plot | None:
    """Each task's headline metric against tokens attended, at the task's longest context."""
    panels = []
    cell = results.cells()
    for model in results.models:
        for task, measure in metrics.items():
            lengths = {row.length for row in results.rows if (row.model, row.task) == (model, task)}
            if not lengths:
                continue
            longest = max(lengths)
            points = []
            for system in results.systems:
                rows = cell.get((model, longest, task, system), [])
                across, up = mean_of(rows, BY_NAME["attended"]), mean_of(rows, measure)
                if across is not None and up is not None:
                    points.append((across.mean, _shown(up, measure), system, system))
            figure = _scatter(
                points,
                "tokens attended exactly per head (log)",
                f"{measure.title}{' (points)' if measure.kind == 'points' else ''}",
                formatting.tokens,
            )
            if figure is not None:
                panels.append(
                    Panel(f"task-{model}-{task}", f"{task}, {formatting.length(longest)} tokens, {model}", figure)
                )
    reading = (
        "One panel per task at its longest context: height is the task's own score (for perplexity lower is better), place the "
        "tokens a head attends to exactly; bars are 95 % intervals."
    )
    return Plot("quality-task", "Quality against tokens attended, task by task", reading, panels) if panels else None


def evidence_against_attended(results: Results) -> Plot | None:
    """Evidence recall against tokens attended."""
    return _measure(
        results,
        "evidence-attended",
        "Evidence recall against tokens attended",
        "Up and left is better: the share of the gold clauses' tokens that a head attends to exactly, against the tokens it "
        "attends to in all.",
        BY_NAME["evidence_recall"],
        "evidence recall (%)",
    )


def kl_against_attended(results: Results) -> Plot | None:
    """KL to full attention against tokens attended, both logarithmic."""
    return _measure(
        results,
        "kl-attended",
        "Divergence from full attention against tokens attended",
        "Down and left is better: how far the next-token distribution is from full attention's (KL, nats, logarithmic), against "
        "the tokens a head attends to exactly.",
        BY_NAME["kl"],
        "KL to full attention (nats, log)",
        log=True,
    )


def needle_depth(results: Results, metrics: dict[str, Measure]) -> list[Plot]:
    """Heat maps of length and depth, one figure per model and task whose items are labelled with a depth."""
    plots = []
    for model in results.models:
        for task, measure in metrics.items():
            rows = [row for row in results.rows if (row.model, row.task) == (model, task) and _depth(row) is not None]
            if not rows or measure.kind != "points":
                continue
            lengths = sorted({row.length for row in rows})
            depths = _depth_groups(rows)
            panels = []
            for system in order(row.system for row in rows):
                grid = np.full((len(depths), len(lengths)), np.nan)
                mine = [row for row in rows if row.system == system]
                for down, (low, high, _) in enumerate(depths):
                    for across, length in enumerate(lengths):
                        here = [row for row in mine if row.length == length and low <= (_depth(row) or 0) <= high]
                        mean = mean_of(here, measure)
                        grid[down, across] = np.nan if mean is None else measure.shown(mean.mean)
                figure, axes = canvas(1.5 + 0.62 * len(lengths), 0.8 + 0.3 * len(depths))
                names = [formatting.length(length) for length in lengths]
                texts = [[f"{value:.0f}" for value in line] for line in grid]
                cells(axes, grid, names, [name for *_, name in depths], (0, 100), texts)
                axes.set_xlabel("context (tokens)", fontsize=9)
                axes.set_ylabel("depth", fontsize=9)
                panels.append(Panel(f"depth-{model}-{task}-{system}", system, figure))
            reading = (
                f"Dark is found: each cell is the mean {measure.title} (points) of the items whose needle lies at that depth "
                "(0 = start, 1 = end) of a context of that length; a system that only sees the end is dark at the bottom only."
            )
            plots.append(
                Plot(f"needle-{model}-{task}", f"{task} by length and depth, {model}", reading, panels, width=250)
            )
    return plots


def retrieved_by_layer(results: Results) -> Plot | None:
    """Retrieved tokens per head, layer by layer."""
    return _layers(
        results,
        "layers-retrieved",
        "Retrieved tokens per layer",
        "Each line is one system: the tokens that a head of that layer asks for beyond the window, mean over items, heads and "
        "answering steps (logarithmic).",
        "retrieved",
        "retrieved tokens per head",
        1.0,
    )


def evidence_by_layer(results: Results) -> Plot | None:
    """Evidence recall, layer by layer."""
    return _layers(
        results,
        "layers-evidence",
        "Evidence recall per layer",
        "Each line is one system: the share of the gold clauses' tokens that the heads of that layer attend to exactly.",
        "evidence_recall",
        "evidence recall (%)",
        100.0,
    )


def _quality(
    results: Results,
    metrics: dict[str, Measure],
    key: str,
    title: str,
    reading: str,
    name: str,
    label: str,
    ticks: Callable[..., str],
    per_hardware: bool = False,
) -> Plot | None:
    panels, missing = [], set()
    measure = BY_NAME[name]
    for model, length in _sizes(results):
        here = [row for row in results.rows if (row.model, row.length) == (model, length)]
        possible = sum(metrics[task].kind == "points" for task in results.tasks(model, length))
        reference = [row for row in here if row.system == FULL]
        machines = list(dict.fromkeys(row.hardware for row in here)) if per_hardware else [None]
        for number, machine in enumerate(machines):
            points: list[Point] = []
            for system in order(row.system for row in here):
                rows = [row for row in here if row.system == system and machine in (None, row.hardware)]
                across = mean_of([row for row in rows if metrics[row.task].kind == "points"], measure)
                answer = overall(rows, reference, metrics)
                if across is None or answer is None or not across.mean > 0:
                    if rows:
                        missing.add(system)
                    continue
                gap, tasks = answer
                text = system if tasks == possible else f"{system} ({tasks} of {possible} tasks)"
                points.append((across.mean, _scaled(gap, 100), system, text))
            figure = _scatter(points, label, "difference to full (points)", ticks, zero=True)
            if figure is not None:
                where = f", {machine}" if machine and len(machines) > 1 else ""
                file = f"{key}-{model}-{length}" + (f"-{number}" if number else "")
                panels.append(Panel(file, f"{model}, {formatting.length(length)} tokens{where}", figure))
    if not panels:
        return None
    notes = (
        [f"Not shown in every panel, {measure.title} not measured there: {', '.join(order(missing))}."]
        if missing
        else []
    )
    return Plot(key, title, reading, panels, notes)


def _measure(
    results: Results, key: str, title: str, reading: str, measure: Measure, label: str, log: bool = False
) -> Plot | None:
    panels, missing, exact = [], set(), set()
    for model, length in _sizes(results):
        points: list[Point] = []
        for system in results.systems:
            rows = [row for row in results.rows if (row.model, row.length, row.system) == (model, length, system)]
            # Both means over the same items.
            rows = [row for row in rows if measure.get(row) is not None]
            across, up = mean_of(rows, BY_NAME["attended"]), mean_of(rows, measure)
            if across is None or up is None:
                if rows:
                    missing.add(system)
            elif log and not up.mean > 0:
                exact.add(system)
            else:
                points.append((across.mean, _shown(up, measure), system, system))
        figure = _scatter(points, "tokens attended exactly per head (log)", label, formatting.tokens, log=log)
        if figure is not None:
            panels.append(Panel(f"{key}-{model}-{length}", f"{model}, {formatting.length(length)} tokens", figure))
    notes = [f"Not shown, attended tokens not observed: {', '.join(order(missing))}."] if missing else []
    notes += [f"Not shown, a KL of 0 has no place on a logarithmic axis: {', '.join(order(exact))}."] if exact else []
    return Plot(key, title, reading, panels, notes) if panels else None


def _scatter(
    points: Sequence[Point], across: str, up: str, ticks: Callable[..., str], zero: bool = False, log: bool = False
) -> Any:
    if not points:
        return None
    figure, axes = canvas()
    axes.set_xscale("log")
    if log:
        axes.set_yscale("log")
    xs = [x for x, *_ in points]
    if log:
        ends = [end for _, found, *_ in points for end in (found.mean, found.low, found.high) if end > found.mean / 10]
        axes.set_ylim(min(ends) / 1.6, max(ends) * 1.6)
    axes.set_xlim(min(xs) / 1.35, max(xs) * 1.35)
    # Those listed first matter most and lie on top.
    for x, found, system, _ in reversed(points):
        colour, marker = look(system).colour, look(system).marker
        if found.has_interval:
            low = max(found.low, found.mean / 10) if log else found.low
            axes.plot([x, x], [low, found.high], color=colour, lw=1.4, alpha=0.4, solid_capstyle="butt", zorder=2)
        size = (10 if system == OURS else 7.5) * (1.4 if marker == "*" else 1)
        axes.plot(
            [x], [found.mean], marker, color=colour, markersize=size, markeredgecolor="white",
            markeredgewidth=0.8, zorder=4 if system == OURS else 3,
        )  # fmt: skip
    if zero:
        axes.axhline(0, color=INK, lw=0.9, ls=(0, (4, 3)), alpha=0.6, zorder=1)
    log_axis(axes.xaxis, ticks, xs)
    if log:
        means = [found.mean for _, found, *_ in points]
        log_axis(axes.yaxis, lambda value, _: formatting.nats(value), means)
    else:
        low, high = axes.get_ylim()
        # Differences that are rounding should not fill the panel.
        middle, half = (low + high) / 2, max((high - low) / 2, 1.0)
        axes.set_ylim(middle - half, middle + half)
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    label_margin(axes, [(x, found.mean, system, text) for x, found, system, text in points])
    return figure


def _layers(results: Results, key: str, title: str, reading: str, name: str, label: str, scale: float) -> Plot | None:
    panels = []
    for model, length in _sizes(results):
        lines: dict[str, np.ndarray[Any, Any]] = {}
        for system in results.systems:
            here = [row for row in results.rows if (row.model, row.length, row.system) == (model, length, system)]
            found = [row.layers[name] for row in here if row.layers.get(name)]
            if not found:
                continue
            depth = max(map(len, found))
            kept = np.array([[np.nan if one is None else one for one in row] for row in found if len(row) == depth])
            counts = (~np.isnan(kept)).sum(axis=0)
            lines[system] = scale * np.nansum(kept, axis=0) / np.where(counts, counts, np.nan)
        lines = {system: line for system, line in lines.items() if np.isfinite(line[-1]) and np.nanmax(line) > 0}
        if not lines:
            continue
        figure, axes = canvas()
        for system, line in lines.items():
            axes.plot(line, color=look(system).colour, lw=2.4 if system == OURS else 1.5, alpha=0.95)
        if name == "retrieved":
            if min(np.nanmin(line) for line in lines.values()) > 0:
                axes.set_yscale("log")
            else:
                axes.set_yscale("symlog", linthresh=1)
                axes.set_ylim(bottom=0)
            axes.yaxis.set_major_formatter(lambda value, _: formatting.tokens(value))
        axes.set_xlabel("layer")
        axes.set_ylabel(label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        label_margin(axes, [(len(line) - 1, float(line[-1]), system, system) for system, line in lines.items()])
        panels.append(Panel(f"{key}-{model}-{length}", f"{model}, {formatting.length(length)} tokens", figure))
    return Plot(key, title, reading, panels) if panels else None


def _sizes(results: Results) -> list[tuple[str, int]]:
    return [(model, length) for model in results.models for length in results.lengths(model)]


def _scaled(found: Estimate, factor: float) -> Estimate:
    return Estimate(found.mean * factor, found.low * factor, found.high * factor, found.items, found.documents)


def _shown(found: Estimate, measure: Measure) -> Estimate:
    show = measure.shown
    return Estimate(show(found.mean), show(found.low), show(found.high), found.items, found.documents)


def _depth(row: Row) -> float | None:
    depth = row.labels.get("depth")
    return float(depth) if isinstance(depth, int | float) and not isinstance(depth, bool) else None


def _depth_groups(rows: Sequence[Row]) -> list[tuple[float, float, str]]:
    """``(low, high, name)``: every depth, or tenths where there are many."""
    depths = sorted({round(_depth(row) or 0, 4) for row in rows})
    if len(depths) <= 11:
        return [(depth - 5e-5, depth + 5e-5, f"{depth:.2g}") for depth in depths]
    edges = np.linspace(0, 1, 11)
    return [
        (low, np.nextafter(high, 0) if high < 1 else 1.0, f"{low:.1f}–{high:.1f}")
        for low, high in zip(edges[:-1], edges[1:], strict=True)
    ]
