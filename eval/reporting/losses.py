"""Where our system loses: every comparison it is significantly behind in, found mechanically."""

from __future__ import annotations

from dataclasses import dataclass

from eval.reporting.load import Results, Row
from eval.reporting.measures import BY_NAME, Measure, difference, differences, mean_of
from eval.reporting.statistics import significant
from eval.reporting.systems import FULL, OURS, order
from eval.reporting.tables import Table, numbers

#: Compared with ``full`` besides the headline metric.
COSTS = ("seconds_per_token",)
#: Compared with every other system besides the headline metric.
QUALITIES = ("kl", "top1", "agreement", "nll_difference", "evidence_recall", "evidence_coverage", "recovery")


@dataclass(frozen=True)
class Losses:
    """The list, and what it was chosen from.

    Parameters
    ----------
    table : list of dict
        One row per loss; against ``full`` first.
    comparisons : int
        Comparisons made.
    unobserved : list of str
        Systems compared although nobody observed how many tokens they attend to.
    """

    table: Table
    comparisons: int
    unobserved: list[str]


def losses(results: Results, metrics: dict[str, Measure], ours: str = OURS) -> Losses:
    """Compare ``ours`` with ``full``, and with every other system that attends exactly to no more tokens.

    A loss is a paired difference whose bootstrap interval lies on the wrong side of 0, however small: stricter than the marks
    of the headline table. Systems whose attention is not observed are compared as well.
    """
    cells = results.cells()
    table: Table = []
    comparisons, unobserved = 0, set()
    for (model, length, task, system), rows in cells.items():
        mine = cells.get((model, length, task, ours), [])
        if system == ours or not mine:
            continue
        more = attends_more(rows, mine)
        if system == FULL:
            measures = [metrics[task], *(BY_NAME[name] for name in COSTS)]
        elif more:
            continue
        else:
            measures = [metrics[task], *(BY_NAME[name] for name in QUALITIES)]
            if more is None:
                unobserved.add(system)
        for measure in measures:
            theirs = rows
            if measure.name in COSTS:
                # Times of different machines do not compare.
                machines = {row.item: row.hardware for row in mine}
                theirs = [row for row in rows if machines.get(row.item) == row.hardware]
            gap = difference(mine, theirs, measure)
            if gap is None or not gap.has_interval:
                continue
            comparisons += 1
            if not significant(gap) or (gap.mean > 0) == measure.higher_is_better:
                continue
            items = {row.item for _, row in differences(mine, theirs, measure)}
            common = [[row for row in group if row.item in items] for group in (mine, theirs)]
            means = [mean_of(group, measure) for group in common]
            attended = [mean_of(group, BY_NAME["attended"]) for group in common]
            assert means[0] is not None and means[1] is not None
            table.append(
                {
                    "model": model,
                    "length": length,
                    "task": task,
                    "metric": measure.title,
                    "kind": measure.kind,
                    "behind": system,
                    ours: measure.shown(means[0].mean),
                    "other": measure.shown(means[1].mean),
                    **numbers("difference", gap, measure.shown_difference),
                    "items": gap.items,
                    "attended": None if attended[0] is None else attended[0].mean,
                    "other_attended": None if attended[1] is None else attended[1].mean,
                }
            )
    places = {name: place for place, name in enumerate(order(row["behind"] for row in table))}
    table.sort(key=lambda row: (row["model"], places[row["behind"]], row["length"]))
    return Losses(table, comparisons, order(unobserved))


def attends_more(rows: list[Row], mine: list[Row]) -> bool | None:
    """Whether a system attends to more tokens than ours on the items both have; None if that was not observed."""
    gap = difference(rows, mine, BY_NAME["attended"])
    return None if gap is None else gap.mean > 0
