"""The report's tables, as rows of plain numbers; how they look is the page's business."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from eval.reporting.load import Results, Row
from eval.reporting.measures import COST, FIDELITY, RETRIEVAL, Measure, difference, differences, mean_of
from eval.reporting.statistics import Estimate, estimate, mark
from eval.reporting.systems import FULL, order

Table = list[dict[str, Any]]
#: In place of a system's name: none could run.
EVERY = "*"


def numbers(name: str, found: Estimate | None, convert: Any) -> dict[str, float | None]:
    """``name``, ``name_low``, ``name_high`` in the shown unit; None where there is nothing."""
    if found is None:
        return {name: None, f"{name}_low": None, f"{name}_high": None}
    low, high = (convert(bound) if found.has_interval else None for bound in (found.low, found.high))
    return {name: convert(found.mean), f"{name}_low": low, f"{name}_high": high}


def headline_table(results: Results, metrics: dict[str, Measure]) -> Table:
    """One row per model, length, task and system: mean, interval, and the paired difference to ``full``."""
    rows: Table = []
    cells = results.cells()
    for (model, length, task, system), found in cells.items():
        measure = metrics[task]
        mean = mean_of(found, measure)
        if mean is None:  # answers were not completed
            continue
        reference = cells.get((model, length, task, FULL), [])
        gap = difference(found, reference, measure) if system != FULL and reference else None
        rows.append(
            {
                "model": model,
                "length": length,
                "task": task,
                "system": system,
                "metric": measure.title,
                "items": mean.items,
                "documents": mean.documents,
                **numbers("mean", mean, measure.shown),
                **numbers("difference", gap, measure.shown_difference),
                "mark": "" if gap is None else mark(gap, measure.higher_is_better, measure.tolerance),
            }
        )
    return _sorted(rows)


def average(rows: Sequence[Row], metrics: dict[str, Measure]) -> Estimate | None:
    """Mean over tasks scored in points of the mean score, each task counting once."""
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row.metrics and metrics[row.task].kind == "points":
            groups[row.task].append(row)
    if not groups:
        return None
    found = [(metrics[row.task].get(row) or 0.0, row, 1 / len(group)) for group in groups.values() for row in group]
    return estimate([value for value, *_ in found], [row.document for _, row, _ in found], [one for *_, one in found])


def overall(rows: Sequence[Row], reference: Sequence[Row], metrics: dict[str, Measure]) -> tuple[Estimate, int] | None:
    """Mean difference to a reference over tasks scored in points, each task counting once, and the number of tasks."""
    values, documents, weights, tasks = [], [], [], 0
    for task, measure in metrics.items():
        if measure.kind != "points":
            continue
        found = differences(
            [row for row in rows if row.task == task], [row for row in reference if row.task == task], measure
        )
        sign = 1 if measure.higher_is_better else -1
        tasks += bool(found)
        for value, row in found:
            values.append(sign * value)
            documents.append(row.document)
            weights.append(1 / len(found))
    return (estimate(values, documents, weights), tasks) if values else None


def overall_table(results: Results, metrics: dict[str, Measure]) -> Table:
    """One row per model, length and system: the mean over tasks of the difference to ``full``, in points."""
    rows: Table = []
    for model, length, system, found in _groups(results.rows):
        reference = [row for row in results.rows if (row.model, row.length, row.system) == (model, length, FULL)]
        possible = sum(metrics[task].kind == "points" for task in results.tasks(model, length))
        answer = overall(found, reference, metrics) if system != FULL else None
        if answer is None:
            continue
        gap, tasks = answer
        rows.append(
            {
                "model": model,
                "length": length,
                "system": system,
                "tasks": tasks,
                "of": possible,
                **numbers("difference", gap, lambda value: 100 * value),
                "mark": mark(gap, True, 0.01),
            }
        )
    return _sorted(rows)


def measures_table(rows: Sequence[Row], measures: Sequence[Measure], per_hardware: bool = False) -> Table:
    """One row per model, length and system (and hardware): mean and interval of each measure over the items of all tasks.

    Systems that have none of the measures are left out.
    """
    table: Table = []
    for model, length, system, found in _groups(rows):
        machines = list(dict.fromkeys(row.hardware for row in found)) if per_hardware else [None]
        for machine in machines:
            here = [row for row in found if machine is None or row.hardware == machine]
            means = {measure.name: mean_of(here, measure) for measure in measures}
            if all(mean is None for mean in means.values()):
                continue
            line: dict[str, Any] = {"model": model, "length": length, "system": system}
            if per_hardware:
                line["hardware"] = machine
            line["items"] = max(mean.items for mean in means.values() if mean is not None)
            for measure in measures:
                line |= numbers(measure.name, means[measure.name], measure.shown)
            table.append(line)
    return _sorted(table)


def fidelity_table(results: Results) -> Table:
    """:func:`measures_table` of KL, top-1, answer agreement and perplexity difference."""
    return measures_table([row for row in results.rows if row.system != FULL], FIDELITY)


def retrieval_table(results: Results) -> Table:
    """:func:`measures_table` of what is attended to, and what of the evidence that is."""
    return measures_table(results.rows, RETRIEVAL)


def cost_table(results: Results) -> Table:
    """:func:`measures_table` of time and device memory, hardware by hardware."""
    return measures_table(results.rows, COST, per_hardware=True)


def absent_table(results: Results) -> Table:
    """Every system that did not run, or not on all items, and why: one row per model, system and reason."""
    found: dict[tuple[str, str, str], list[tuple[str, str]]] = defaultdict(list)
    cells = results.cells()
    for line in results.skipped:
        task, length = line["task"], line["length"]
        if (line["model"], length, task, line["system"]) in cells:
            # A later run, or the system's own one, made up for it.
            continue
        found[line["model"] or "all", line["system"], line["reason"]].append(
            (task or "all tasks", "all lengths" if length is None else f"{int(length):,}")
        )
    wanted: dict[tuple[str, int, str], set[str]] = defaultdict(set)
    for (model, length, task, _), rows in cells.items():
        wanted[model, length, task] |= {row.item for row in rows}
    for (model, length, task), items in wanted.items():
        for system in results.systems:
            rows = cells.get((model, length, task, system), [])
            if len(rows) == len(items):
                continue
            if rows:
                reason = f"only {len(rows)} of {len(items)} items"
            elif _explained(results.skipped, model, task, length, system):
                continue
            else:
                reason = "no reason recorded"
            found[model, system, reason].append((task, f"{length:,}"))
    names = order(system for _, system, _ in found)
    return [
        {
            "model": model,
            "system": system,
            "tasks": ", ".join(dict.fromkeys(task for task, _ in places)),
            "lengths": ", ".join(dict.fromkeys(length for _, length in places)),
            "reason": reason,
        }
        for (model, system, reason), places in sorted(
            found.items(), key=lambda one: (one[0][0], names.index(one[0][1]))
        )
    ]


def _explained(skipped: Sequence[dict[str, Any]], model: str, task: str, length: int, system: str) -> bool:
    wanted = {"model": model, "task": task, "length": length, "system": system}
    return any(all(line[name] in (None, EVERY, value) for name, value in wanted.items()) for line in skipped)


def _groups(rows: Sequence[Row]) -> list[tuple[str, int, str, list[Row]]]:
    found: dict[tuple[str, int, str], list[Row]] = defaultdict(list)
    for row in rows:
        found[row.model, row.length, row.system].append(row)
    return [(*key, group) for key, group in found.items()]


def _sorted(rows: Table) -> Table:
    models = {name: place for place, name in enumerate(dict.fromkeys(row["model"] for row in rows))}
    systems = {name: place for place, name in enumerate(order(row["system"] for row in rows))}
    return sorted(rows, key=lambda row: (models[row["model"]], row["length"], systems[row["system"]]))
