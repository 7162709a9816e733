"""What rows are measured by: names, units, directions and explanations."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from eval.reporting.load import ResultsError, Row
from eval.reporting.statistics import Estimate, estimate


@dataclass(frozen=True)
class Measure:
    """One number of a row.

    Parameters
    ----------
    name, title : str
    kind : str
        ``"points"`` (a share, shown times 100), ``"perplexity"`` (nats, shown exponentiated), ``"nats"``, ``"tokens"``,
        ``"seconds"`` or ``"change"`` (difference in nats, shown as change of the perplexity in percent).
    higher_is_better : bool
    get : callable
        The row's value, None where it has none.
    text : str
        For the glossary.
    """

    name: str
    title: str
    kind: str
    higher_is_better: bool
    get: Callable[[Row], float | None]
    text: str = ""

    @property
    def tolerance(self) -> float:
        """Differences up to this count as none: one point, or 1 % of the perplexity."""
        return 0.01

    def shown(self, value: float) -> float:
        """The value in the unit that is shown: points, perplexity, percent, tokens, nats or seconds."""
        if self.kind == "points":
            return 100 * value
        if self.kind == "perplexity":
            return math.exp(value)
        return 100 * math.expm1(value) if self.kind == "change" else value

    def shown_difference(self, value: float) -> float:
        """A difference in the unit that is shown: points, percent of the perplexity, tokens, nats or seconds."""
        if self.kind in ("perplexity", "change"):
            return 100 * math.expm1(value)
        return 100 * value if self.kind == "points" else value


def _from(part: str, name: str) -> Callable[[Row], float | None]:
    return lambda row: getattr(row, part).get(name)


def _share(row: Row) -> float | None:
    attended, context = row.retrieval.get("attended"), row.retrieval.get("context")
    return attended / context if attended is not None and context else None


def _bytes_share(row: Row) -> float | None:
    return row.device_bytes / row.full_bytes if row.device_bytes is not None and row.full_bytes else None


FIDELITY = [
    Measure(
        "kl", "KL", "nats", False, _from("fidelity", "kl"),
        "Kullback-Leibler divergence KL(full || system) of the next-token distributions, in nats, mean over the answering "
        "steps; 0 means the same distribution.",
    ),
    Measure(
        "top1", "top-1", "points", True, _from("fidelity", "top1"),
        "Share of answering steps at which the most likely next token is the one of full attention.",
    ),
    Measure(
        "agreement", "answer agreement", "points", True, _from("fidelity", "agreement"),
        "Share of items with the same outcome as full attention, right or wrong: the same answer, or the same choice.",
    ),
    Measure(
        "nll_difference", "perplexity difference", "change", False, _from("fidelity", "nll_difference"),
        "Change of the perplexity on the scored tokens against full attention, in percent; below 0 the system is less "
        "surprised.",
    ),
]  # fmt: skip

RETRIEVAL = [
    Measure(
        "attended", "attended tokens", "tokens", False, _from("retrieval", "attended"),
        "Tokens that a query head attends to exactly at an answering step: window and retrieved tokens, mean over layers, "
        "heads and steps. Tokens answered for by a low-bit copy or a mean are not counted.",
    ),
    Measure(
        "share", "share of context", "points", False, _share,
        "Attended tokens as a share of the context.",
    ),
    Measure(
        "retrieved", "retrieved tokens", "tokens", False, _from("retrieval", "retrieved"),
        "Tokens outside the window that a query head itself asked for, mean over layers, heads and steps.",
    ),
    Measure(
        "fetched", "fetched tokens", "tokens", False, _from("retrieval", "fetched"),
        "Tokens outside the window read for a KV head: the union over the query heads that share it.",
    ),
    Measure(
        "evidence_recall", "evidence recall", "points", True, _from("retrieval", "evidence_recall"),
        "Share of the tokens of the gold evidence that are among the exactly attended ones, mean over layers, query heads and "
        "answering steps.",
    ),
    Measure(
        "evidence_coverage", "evidence coverage", "points", True, _from("retrieval", "evidence_coverage"),
        "The same for the union over a layer's heads: evidence that at least one head attends to exactly.",
    ),
    Measure(
        "recovery", "recovery ratio", "points", True, _from("retrieval", "recovery"),
        "Share of full attention's probability mass that falls on the exactly attended tokens.",
    ),
]  # fmt: skip

COST = [
    Measure(
        "seconds_per_token", "seconds per token", "seconds", False, lambda row: row.seconds_per_token,
        "Time of one decoding step, without prefill. Comparable on equal hardware only.",
    ),
    Measure(
        "device_share", "device bytes", "points", False, _bytes_share,
        "Bytes of keys, values and indexes that lie beside the model, as a share of the bytes of all keys and values.",
    ),
]  # fmt: skip

BY_NAME = {measure.name: measure for measure in (*FIDELITY, *RETRIEVAL, *COST)}

#: Headline scores that legal tasks use, for the glossary.
SCORES = {
    "token_f1": "Overlap of the words of answer and gold answer: harmonic mean of precision and recall (SQuAD's F1).",
    "exact_match": "Share of answers equal to a gold answer, up to case, punctuation and articles.",
    "accuracy": "Share of items whose likeliest choice is the right one.",
    "char_f1": "Harmonic mean of the shares of the quoted characters that are right and of the right ones that are quoted.",
    "rouge_l": "Longest common subsequence of the words of answer and gold answer, as an F-measure (ROUGE-L).",
    "score": "Share of the points the task gives.",
    "nll": "Shown as perplexity, exp(mean negative log-likelihood per token): lower is better.",
}


def headline(rows: Iterable[Row]) -> tuple[dict[str, Measure], list[str]]:
    """Each task's headline metric, and notes where it had to be guessed.

    It is the metric that the task declares; for a task that is not known here, ``score`` or ``nll`` if rows have it, else the
    first metric of its rows.

    Raises
    ------
    ResultsError
        If a row with metrics lacks its task's headline metric. Rows without any are of systems that did not answer.
    """
    declared = _declared()
    found: dict[str, Measure] = {}
    notes = []
    rows = [row for row in rows if row.metrics]
    for row in rows:
        if row.task in found:
            continue
        name, higher = declared.get(row.task, ("", True))
        if not name:
            name = next((known for known in ("score", "nll") if known in row.metrics), next(iter(row.metrics)))
            higher = name != "nll"
            if len(row.metrics) > 1 and name not in ("score", "nll"):
                notes.append(
                    f"{row.task} is no known task: its headline metric is taken to be {name}, higher is better."
                )
        kind = "perplexity" if name == "nll" else "points"
        found[row.task] = Measure(name, "perplexity" if name == "nll" else name, kind, higher, _from("metrics", name))
    for row in rows:
        if found[row.task].get(row) is None:
            raise ResultsError(
                f"{row.place}: task {row.task} is judged by {found[row.task].name}, which is not among the row's metrics "
                f"({', '.join(row.metrics)}). Rows of different versions of the task do not mix; do its items again."
            )
    return found, notes


def _declared() -> dict[str, tuple[str, bool]]:
    try:
        from eval.legal import TASKS
    except ImportError:
        # A report needs neither torch nor the tasks' own packages.
        return {}
    return {name: (task.metric, task.higher_is_better) for name, task in TASKS.items()}


def mean_of(rows: Sequence[Row], measure: Measure) -> Estimate | None:
    """Mean over the rows that have the measure, each item counting once; None if none has."""
    found = [(value, row.document) for row in rows if (value := measure.get(row)) is not None]
    return estimate([value for value, _ in found], [document for _, document in found]) if found else None


def differences(rows: Sequence[Row], reference: Sequence[Row], measure: Measure) -> list[tuple[float, Row]]:
    """``rows - reference`` on the items that both have, in the measure's own unit."""
    expected = {(row.task, row.item): measure.get(row) for row in reference}
    found = []
    for row in rows:
        value, other = measure.get(row), expected.get((row.task, row.item))
        if value is not None and other is not None:
            found.append((value - other, row))
    return found


def difference(rows: Sequence[Row], reference: Sequence[Row], measure: Measure) -> Estimate | None:
    """Mean paired difference to a reference; None without common items."""
    found = differences(rows, reference, measure)
    return estimate([value for value, _ in found], [row.document for _, row in found]) if found else None
