"""A folder of results: rows that survive an interruption, and what they were made with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

#: What tells one row from another.
KEY = ("model", "task", "length", "system", "item")

#: Parts of a configuration that choose rows and do not change them.
SELECTIONS = {"models", "tasks", "systems", "lengths"}

#: What may differ from one run into a folder to the next, and is kept of each.
ABOUT = ("command", "versions", "commit", "hardware", "date")


class ResultsError(ValueError):
    """A results folder that cannot be read or continued."""


def config_hash(config: dict[str, Any]) -> str:
    """Eight hexadecimal digits of a configuration."""
    return hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()[:8]


class Results:
    """Rows of JSON lines in a folder.

    Parameters
    ----------
    folder : Path
        Made if it does not exist.
    rank : int, optional
        Of several processes that write to one folder: each appends to a file of its own.
    """

    def __init__(self, folder: Path, rank: int | None = None) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        suffix = "" if rank is None else f".{rank}"
        self._rows = self.folder / f"rows{suffix}.jsonl"
        self._skipped = self.folder / f"skipped{suffix}.jsonl"
        _drop_broken_end(self._rows)
        _drop_broken_end(self._skipped)

    def begin(self, run: dict[str, Any]) -> None:
        """Write ``run.json``, or check that the folder's rows mean the same as those to come.

        More models, tasks, systems and lengths may join the folder; everything else has to be as it was.

        Raises
        ------
        ResultsError
            If it holds results of another configuration.
        """
        path = self.folder / "run.json"
        run = json.loads(json.dumps(run, default=str))
        if path.exists():
            held = json.loads(path.read_text(encoding="utf-8"))
            old, new = held["config"], run["config"]
            different = sorted(key for key in {*old, *new} if old.get(key) != new.get(key) and key not in SELECTIONS)
            if different:
                raise ResultsError(
                    f"{self.folder} holds results of another configuration: {', '.join(different)} differ(s). Choose another "
                    "--output, or give the options it was begun with (see run.json)."
                )
            for key in SELECTIONS & {*old}:
                old[key] = list(dict.fromkeys([*old[key], *new.get(key, [])]))
            about = {key: run.get(key) for key in ABOUT}
            if about not in ({key: held.get(key) for key in ABOUT}, *held.get("later_runs", [])):
                held.setdefault("later_runs", []).append(about)
            run = held
        # Whole or not at all, also where several processes begin at once.
        temporary = path.with_name(f"{self._rows.stem}.run.tmp")
        temporary.write_text(json.dumps(run, indent=1), encoding="utf-8")
        temporary.replace(path)

    def done(self, key: tuple[str, ...] = KEY) -> set[tuple[Any, ...]]:
        """Keys of the rows there are, of all processes."""
        return {tuple(row.get(name) for name in key) for row in self.rows()}

    def rows(self) -> Iterator[dict[str, Any]]:
        """Every row of every process."""
        yield from read(self.folder, "rows")

    def add(self, row: dict[str, Any]) -> None:
        """Append a row; on disk when this returns."""
        _append(self._rows, row)

    def skip(self, row: dict[str, Any]) -> None:
        """Record what was not run, once."""
        if row not in list(read(self.folder, "skipped")):
            _append(self._skipped, row)


def read(folder: Path, kind: str) -> Iterator[dict[str, Any]]:
    """Lines of ``rows*.jsonl`` or ``skipped*.jsonl``; the unfinished last line of an interrupted run is left out.

    Raises
    ------
    ResultsError
        For a line in the middle that is no JSON.
    """
    for path in sorted(Path(folder).glob(f"{kind}*.jsonl")):
        lines = path.read_bytes().split(b"\n")
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                yield json.loads(line)
            except ValueError as error:
                if number == len(lines):
                    return
                raise ResultsError(
                    f"{path}, line {number} is not JSON ({error}). Remove the line to do its item again."
                ) from error


def _append(path: Path, row: dict[str, Any]) -> None:
    with path.open("ab") as handle:
        handle.write(json.dumps(row, default=float).encode() + b"\n")
        handle.flush()


def _drop_broken_end(path: Path) -> None:
    """Cut a line without an end off, so that the next row starts on a line of its own."""
    if not path.exists():
        return
    data = path.read_bytes()
    if data and not data.endswith(b"\n"):
        path.write_bytes(data[: data.rfind(b"\n") + 1])
