"""Reading and checking a results folder."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from eval.reporting.systems import OURS, look, order

_TEXTS = ("model", "task", "system", "item", "document")


class ResultsError(ValueError):
    """A results folder that no report can be made of."""


@dataclass(frozen=True)
class Row:
    """One system's answer to one item.

    Parameters
    ----------
    model, task, system, item, document : str
    length : int
        Nominal context length in tokens.
    metrics : dict
        Scores, finite numbers.
    labels, retrieval, fidelity, layers : dict
        Facts and measurements; empty where there are none. What could not be measured is absent.
    seconds_per_token, device_bytes, full_bytes : float, optional
    hardware : str
    setting : dict
        Swept fields of an ablation; empty otherwise.
    place : str
        File and line, for messages.
    """

    model: str
    task: str
    length: int
    system: str
    item: str
    document: str
    metrics: dict[str, float]
    labels: dict[str, Any] = field(default_factory=dict)
    retrieval: dict[str, float] = field(default_factory=dict)
    fidelity: dict[str, float] = field(default_factory=dict)
    layers: dict[str, list[float | None]] = field(default_factory=dict)
    seconds_per_token: float | None = None
    device_bytes: float | None = None
    full_bytes: float | None = None
    hardware: str = ""
    setting: dict[str, Any] = field(default_factory=dict)
    place: str = ""

    @property
    def setting_key(self) -> str:
        """The setting as text, to compare by."""
        return json.dumps(self.setting, sort_keys=True) if self.setting else ""


@dataclass(frozen=True)
class Results:
    """A results folder.

    Parameters
    ----------
    folder : Path
    rows : list of Row
        Of systems as configured.
    ablation : list of Row
        Of swept settings.
    skipped : list of dict
        ``model``, ``task``, ``length``, ``system``, ``reason``.
    run : dict
        ``run.json``, empty if there is none.
    notes : list of str
        What the reader should know about the folder's state.
    """

    folder: Path
    rows: list[Row]
    ablation: list[Row]
    skipped: list[dict[str, Any]]
    run: dict[str, Any]
    notes: list[str]

    @property
    def models(self) -> list[str]:
        """Models in order of appearance."""
        return list(dict.fromkeys(row.model for row in self.rows))

    @property
    def systems(self) -> list[str]:
        """Systems in the order of the report."""
        return order(row.system for row in self.rows)

    def lengths(self, model: str) -> list[int]:
        """Context lengths of a model, ascending."""
        return sorted({row.length for row in self.rows if row.model == model})

    def tasks(self, model: str, length: int) -> list[str]:
        """Tasks of a model at a length, in order of appearance."""
        return list(dict.fromkeys(row.task for row in self.rows if (row.model, row.length) == (model, length)))

    def cells(self) -> dict[tuple[str, int, str, str], list[Row]]:
        """Rows by ``(model, length, task, system)``."""
        found: dict[tuple[str, int, str, str], list[Row]] = defaultdict(list)
        for row in self.rows:
            found[row.model, row.length, row.task, row.system].append(row)
        return dict(found)


def load(folder: Path) -> Results:
    """Read ``rows*.jsonl``, ``skipped*.jsonl`` and ``run.json``; several processes may have written files of their own.

    Raises
    ------
    ResultsError
        If the folder does not exist, holds neither rows nor skipped systems, a line is corrupt, lacks a field or has a score
        that is no finite number, or one item was answered twice by one system.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ResultsError(f"{folder} is not a folder. Give the folder that an evaluation wrote rows.jsonl into.")
    notes: list[str] = []
    rows = [_row(place, line) for place, line in _lines(folder, "rows", notes)]
    skipped = [_skipped(place, line) for place, line in _lines(folder, "skipped", notes)]
    if not rows and not skipped:
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        raise ResultsError(
            f"{folder} holds no results: expected lines in rows.jsonl, found {found}. Run an evaluation with this output folder "
            "first."
        )
    _refuse_repeats(rows)
    run = _run(folder, notes)
    rows = [_unnamed(row, run) for row in _complete(rows)]
    return Results(
        folder,
        [row for row in rows if not row.setting],
        [row for row in rows if row.setting],
        skipped,
        run,
        notes,
    )


def _lines(folder: Path, kind: str, notes: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    for path in sorted(folder.glob(f"{kind}*.jsonl")):
        lines = path.read_bytes().split(b"\n")
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            place = f"{path}, line {number}"
            try:
                value = json.loads(line)
            except ValueError as error:
                if number == len(lines):
                    # No line end follows: the run that wrote it was interrupted, and does the item again when continued.
                    notes.append(f"The last line of {path.name} is unfinished (an interrupted run); it is left out.")
                    return
                raise ResultsError(
                    f"{place} is not JSON ({error}). Remove the line and continue the run to do its item again."
                ) from error
            if not isinstance(value, dict):
                raise ResultsError(f"{place}: expected a JSON object, got {type(value).__name__}. Remove the line.")
            yield place, value


def _number(value: Any) -> float | None:
    """The number, or None for what is missing or not finite."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _numbers(value: Any) -> dict[str, float]:
    found = {name: _number(one) for name, one in (value or {}).items()}
    return {name: one for name, one in found.items() if one is not None}


def _row(place: str, line: dict[str, Any]) -> Row:
    missing = [name for name in (*_TEXTS, "length", "metrics") if line.get(name) in (None, "")]
    if missing:
        raise ResultsError(
            f"{place} lacks {', '.join(missing)}: not a result row. Remove the line or do its item again."
        )
    length = _number(line["length"])
    if length is None or length <= 0:
        raise ResultsError(f"{place}: length is {line['length']!r}, expected a positive number of tokens.")
    metrics = line["metrics"]
    # A system whose answers were not completed (--answers) has fidelity and retrieval alone.
    unanswered = metrics == {} and line.get("answer", "") is None
    if not unanswered and (not isinstance(metrics, dict) or not metrics or len(_numbers(metrics)) != len(metrics)):
        raise ResultsError(f"{place}: metrics are {metrics!r}, expected names with finite numbers. Do the item again.")
    layers = {
        name: [_number(one) for one in values]
        for name, values in (line.get("layers") or {}).items()
        if isinstance(values, list)
    }
    return Row(
        **{name: str(line[name]) for name in _TEXTS},
        length=int(length),
        metrics=_numbers(metrics),
        labels=dict(line.get("labels") or {}),
        retrieval=_numbers(line.get("retrieval")),
        fidelity=_numbers(line.get("fidelity")),
        layers=layers,
        seconds_per_token=_number(line.get("seconds_per_token")),
        device_bytes=_number(line.get("device_bytes")),
        full_bytes=_number(line.get("full_bytes")),
        hardware=str(line.get("hardware") or ""),
        setting=dict(line.get("setting") or {}),
        place=place,
    )


def _skipped(place: str, line: dict[str, Any]) -> dict[str, Any]:
    if not line.get("system"):
        raise ResultsError(f"{place} names no system. Remove the line.")
    names = ("model", "task", "length", "system", "reason")
    return {name: line.get(name) for name in names} | {"reason": line.get("reason") or "no reason recorded"}


def _refuse_repeats(rows: list[Row]) -> None:
    seen: dict[tuple[Any, ...], str] = {}
    for row in rows:
        key = (row.model, row.task, row.length, row.system, row.item, row.setting_key)
        if key in seen:
            raise ResultsError(
                f"{row.place}: {row.system} already answered item {row.item!r} of {row.task} at {row.length} ({seen[key]}). "
                "An item may count once; remove one of the lines."
            )
        seen[key] = row.place


def _run(folder: Path, notes: list[str]) -> dict[str, Any]:
    path = folder / "run.json"
    if not path.exists():
        notes.append("There is no run.json: configuration, versions and commit of this run were not recorded.")
        return {}
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ResultsError(f"{path} is not JSON ({error}). Remove it to report without the configuration.") from error
    if not isinstance(run, dict):
        raise ResultsError(f"{path}: expected a JSON object, got {type(run).__name__}.")
    return run


def _unnamed(row: Row, run: dict[str, Any]) -> Row:
    """Settings of a sweep are one system: a name that only repeats the setting becomes the one the sweep started from."""
    if not row.setting or not all(f"{name}=" in row.system for name in row.setting):
        return row
    base = (run.get("config") or {}).get("base")
    return replace(row, system=base if isinstance(base, str) else OURS)


def _complete(rows: list[Row]) -> list[Row]:
    """Dense systems attend to everything by definition, also where nobody observed them."""
    contexts: dict[tuple[str, str, int, str], float] = {}
    evidence: set[tuple[str, str, int, str]] = set()
    for row in rows:
        key = (row.model, row.task, row.length, row.item)
        if "context" in row.retrieval:
            contexts[key] = row.retrieval["context"]
        if "evidence_recall" in row.retrieval:
            evidence.add(key)
    for row in rows:
        key = (row.model, row.task, row.length, row.item)
        if look(row.system).dense:
            context = contexts.get(key, float(row.length))
            whole = {"attended": context, "context": context, "recovery": 1.0}
            if key in evidence:
                whole |= {"evidence_recall": 1.0, "evidence_coverage": 1.0}
            row.retrieval.update({name: value for name, value in whole.items() if name not in row.retrieval})
    return rows
