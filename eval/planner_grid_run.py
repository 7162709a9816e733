"""A run of the grid: correctness first, then the calibration, then one context after the other, each written when it is done."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from alaya_hf.cli.calibrate import calibrate
from alaya_hf.planner import ModelShape
from alaya_hf.planner.calibration import Calibration, load_calibration, save_calibration
from eval.planner_grid import Measure, Profile, check, grid, on_device, on_host, summary
from eval.report import markdown, write_csv

_EVERY = 10.0


class Clock:
    """Says what is being done, at most every ten seconds, with the seconds since the beginning."""

    def __init__(self, say: Callable[[str], Any]) -> None:
        self._say, self._began, self._last = say, time.perf_counter(), float("-inf")

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return time.perf_counter() - self._began

    def say(self, text: str) -> None:
        """Now."""
        self._say(f"[{self.seconds:5.1f} s] {text}")
        self._last = self.seconds

    def step(self, text: str) -> None:
        """If nothing was said for a while."""
        if self.seconds - self._last >= _EVERY:
            self.say(text)


def run_grid(
    shape: ModelShape, contexts: tuple[int, ...], engine: str, output: Path, say: Callable[[str], Any], limit: float = 0.0,
    calibration: Calibration | None = None, at: Callable[[ModelShape, int], tuple[Measure, Profile]] | None = None,
) -> list[str]:  # fmt: skip
    """Calibrate, measure, judge and write ``calibration.json``, ``grid.csv`` and ``plans.csv``.

    Parameters
    ----------
    shape : ModelShape
        Of the whole model.
    contexts : tuple of int
    engine : {"host", "device"}
    output : Path
        Folder.
    say : callable
        Where progress goes.
    limit : float
        Seconds after which no further context is begun; 0: none.
    calibration : Calibration, optional
        Default: measured, and read back from its file as the planner would read it.
    at : callable, optional
        Gives how plans are measured at a context; default: by the engine.

    Returns
    -------
    list of str
        Paragraphs of Markdown.

    Raises
    ------
    RuntimeError
        If no context could be measured.
    """
    clock = Clock(say)
    texts = []
    if engine == "device" and at is None:
        clock.say("correctness: a step of the device engine against exact attention, 4,096 tokens")
        error = check(shape)
        clock.say(f"largest relative error {100 * error:.2f} %")
        texts.append(f"correctness: relative error {100 * error:.2f} % over 4,096 tokens, nearly everything kept")
    if calibration is None:
        clock.say("calibrating")
        path = output / "calibration.json"
        save_calibration(calibrate(shape, host=engine == "host", advance=clock.step), path)
        calibration = load_calibration(shape, path)
    error_text = "without a report"
    if calibration.median_error is not None:
        error_text = f"median error {100 * calibration.median_error:.0f} % over {len(calibration.report)} whole steps"
    margin = calibration.margin(engine)
    texts.append(f"calibration: {error_text}; SLOs are planned with {100 * (margin - 1):.0f} % to spare")
    clock.say(texts[-1])
    measured = at or (on_host if engine == "host" else on_device)
    cases: list[dict[str, Any]] = []
    plans: list[dict[str, Any]] = []
    for context in contexts:
        if limit and clock.seconds > limit:
            texts.append(f"{context} tokens were not measured: {limit:.0f} seconds were up")
            clock.say(texts[-1])
            continue
        try:
            clock.say(f"{context} tokens")
            measure, profile = measured(shape, context)
            found, rows = grid(shape, calibration, context, engine, measure, profile, clock.step)
        except (RuntimeError, MemoryError, ArithmeticError) as failure:  # one context that does not fit is not the end
            texts.append(f"{context} tokens failed: {type(failure).__name__}: {str(failure)[:500]}")
            clock.say(texts[-1])
            continue
        cases, plans = cases + found, plans + rows
        write_csv(output / "grid.csv", cases)
        write_csv(output / "plans.csv", plans)
        clock.say(f"{context} tokens: {len(rows)} plans, {sum(bool(row['failed']) for row in rows)} of them failed")
    if not cases:
        raise RuntimeError("nothing was measured: " + "; ".join(texts))
    by_context = [
        {"context": n, **summary([c for c in cases if c["context"] == n], [p for p in plans if p["context"] == n])}
        for n in dict.fromkeys(case["context"] for case in cases)
    ]
    rows = [*by_context, {"context": "all", **summary(cases, plans)}]
    if len(by_context) == 1:
        rows = rows[1:]
    columns = (
        "context", "budget", "SLO", "plans", "SLO ms", "95th percentile ms", "attention ms", "best attention ms", "can be met",
        "met", "warned", "x best time", "x least bytes", "failed",
    )  # fmt: skip
    texts += [markdown(rows), markdown([{name: case[name] for name in columns} for case in cases])]
    clock.say("done")
    return texts
