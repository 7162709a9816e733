"""Cells of a study: rows of JSON lines, each under the settings that it was measured with."""

from __future__ import annotations

import csv
import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from alaya_hf.errors import AlayaError
from eval.running.store import Results
from eval.speed_model import SystemFails


class Cells:
    """The cells of a folder, which survive an interruption.

    Parameters
    ----------
    folder : Path
    again : bool
        Measure cells anew that could not be measured before.
    seconds : float
        From now on; afterwards no cell is begun. 0: no limit.
    """

    def __init__(self, folder: Path, again: bool = False, seconds: float = 0) -> None:
        self.results = Results(folder)
        self._rows = {_key(row["settings"]): row for row in self.results.rows()}
        self._again = again
        self._end = time.monotonic() + seconds if seconds else float("inf")

    def measure(
        self, settings: dict[str, Any], run: Callable[[], dict[str, Any]], expected: float = 0
    ) -> dict[str, Any]:
        """The cell of these settings: as it is held, or measured now, or the reason why it cannot be.

        Parameters
        ----------
        expected : float
            Seconds that it takes, where they are known: a cell that would end after the limit is not begun.

        Returns
        -------
        dict
            ``settings``, and ``seconds`` and what `run` returned, or ``not run``. ``later`` says that only time was wanting:
            such a cell is measured when it is next asked for.
        """
        held = self._rows.get(_key(settings))
        if held is not None and "later" not in held and not (self._again and "not run" in held):
            return held
        began = time.monotonic()
        if began + expected >= self._end:
            if held is None:
                why = f"no time left{f' for about {expected:.0f} s' if expected else ''}"
                held = self._keep({"settings": settings, "not run": why, "later": True})
            return held
        try:
            found = run()
        except (AlayaError, SystemFails) as error:
            found = {"not run": str(error)}
        except (torch.OutOfMemoryError, MemoryError) as error:
            found = {"not run": f"out of memory: {str(error).splitlines()[0] if str(error) else 'no room'}"}
        row = self._keep({"settings": settings, "seconds": time.monotonic() - began, **found})
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return row

    def _keep(self, row: dict[str, Any]) -> dict[str, Any]:
        self.results.add(row)
        self._rows[_key(row["settings"])] = row
        return row

    def rows(self) -> list[dict[str, Any]]:
        """All cells, the last measurement of each."""
        return list(self._rows.values())

    def write_csv(self, path: Path) -> None:
        """All cells as a table; a column that a cell does not have is empty."""
        flat = [
            {**row["settings"], **{name: value for name, value in row.items() if name != "settings"}}
            for row in self.rows()
        ]
        columns = dict.fromkeys(name for row in flat for name in row)
        with path.open("w", newline="", encoding="utf-8") as handle:
            writer = csv.DictWriter(handle, fieldnames=list(columns))
            writer.writeheader()
            writer.writerows(flat)


def _key(settings: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(sorted(settings.items()))
