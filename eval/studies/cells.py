"""Cells of a study: rows of JSON lines, each under the settings that it was measured with."""

from __future__ import annotations

import gc
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
    """

    def __init__(self, folder: Path, again: bool = False) -> None:
        self.results = Results(folder)
        self._rows = {_key(row["settings"]): row for row in self.results.rows()}
        self._again = again

    def measure(self, settings: dict[str, Any], run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The cell of these settings: as it is held, or measured now, or the reason why it cannot be.

        Returns
        -------
        dict
            ``settings``, and what `run` returned or ``not run``.
        """
        held = self._rows.get(_key(settings))
        if held is not None and not (self._again and "not run" in held):
            return held
        try:
            found = run()
        except (AlayaError, SystemFails) as error:
            found = {"not run": str(error)}
        except (torch.OutOfMemoryError, MemoryError) as error:
            found = {"not run": f"out of memory: {str(error).splitlines()[0] if str(error) else 'no room'}"}
        row = {"settings": settings, **found}
        self.results.add(row)
        self._rows[_key(settings)] = row
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return row

    def rows(self) -> list[dict[str, Any]]:
        """All cells, the last measurement of each."""
        return list(self._rows.values())


def _key(settings: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(sorted(settings.items()))
