"""Tables: rows of plain values to Markdown and CSV."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        if value != value:
            return ""
        return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"
    return str(value)


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """A Markdown table of rows with equal keys."""
    if not rows:
        return "(nothing)"
    columns = list(rows[0])
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(_text(row.get(column)) for column in columns) + " |" for row in rows]
    return "\n".join(lines)


def read_csv(path: Path) -> list[dict[str, Any]]:
    """Rows of a CSV file; numbers as numbers, empty fields as None."""

    def value(text: str) -> Any:
        for kind in (int, float):
            try:
                return kind(text)
            except ValueError:
                pass
        return text or None

    with path.open(newline="", encoding="utf-8") as handle:
        return [{name: value(text) for name, text in row.items()} for row in csv.DictReader(handle)]


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Rows as CSV."""
    with path.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
