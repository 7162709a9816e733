"""The grid that judges the planner, with times that are known."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from alaya_hf.planner import ModelShape, Planner
from alaya_hf.planner.calibration import load_calibration
from alaya_hf.planner.layer_plan import LayerPlan
from alaya_hf.planner.profile import load_profile
from eval.planner_grid import Measured, summary
from eval.planner_grid_run import run_grid
from eval.report import read_csv

SHAPE = ModelShape(4, 32, 8, 128, torch.bfloat16, "cuda", 10**9)
CONTEXTS = (32768, 131072, 524288)


@pytest.fixture(autouse=True)
def _shipped(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("ALAYA_HF_CALIBRATION", raising=False)


def told(factor: float, fails: str = "") -> Any:
    """A timer that finds every plan `factor` times as slow as estimated, and that cannot run the plans named."""

    def at(shape: ModelShape, context: int) -> Any:
        shipped = load_profile()
        profile = replace(shipped, context=context, layers=shipped.layers[10:11])
        planner = Planner(_settings(), shape, load_calibration(shape), profile)

        def measure(plan: LayerPlan) -> Measured:
            if fails and fails in " ".join(plan.names()):
                raise RuntimeError("CUDA error: out of patience\nand more")
            estimate = planner.estimate(plan, 0, context, 1, context)
            return Measured(factor * estimate.seconds, factor * estimate.tail, 0.01, 100.0, 1 << 20, 1 << 20)

        return measure, profile

    return at


def _settings() -> Any:
    from alaya_hf import AlayaConfig

    return AlayaConfig(planner="cost", engine="device")


def cases_of(folder: Path) -> list[dict[str, Any]]:
    return read_csv(folder / "grid.csv")


def test_a_planner_whose_estimates_hold_is_judged_right(tmp_path: Path) -> None:
    said: list[str] = []
    texts = run_grid(SHAPE, CONTEXTS, "device", tmp_path, said.append, 0, load_calibration(SHAPE), told(1.0))
    cases, plans = cases_of(tmp_path), read_csv(tmp_path / "plans.csv")
    possible = [case for case in cases if case["can be met"] == "True"]
    assert len(cases) >= 30 and len(possible) >= 30
    assert all(case["met"] == "True" and case["warned"] == "False" for case in possible)
    assert all(case["x least bytes"] <= 1.2 for case in possible)
    assert all(case["in budget"] == "True" for case in cases)
    impossible = [case for case in cases if case["can be met"] == "False"]
    assert impossible and all(case["warned"] == "True" and case["met"] == "False" for case in impossible)
    assert all(abs(plan["predicted / measured"] - 1) < 1e-9 for plan in plans)
    assert "met %" in texts[-2] and any("524288" in line for line in said)


def test_a_planner_that_takes_plans_for_faster_than_they_are_misses(tmp_path: Path) -> None:
    run_grid(SHAPE, CONTEXTS[:1], "device", tmp_path, lambda text: None, 0, load_calibration(SHAPE), told(1.6))
    cases, plans = cases_of(tmp_path), read_csv(tmp_path / "plans.csv")
    found = summary([_typed(case) for case in cases], [dict(plan) for plan in plans])
    assert found["median error of the time %"] == pytest.approx(37.5, abs=0.1)
    assert found["met"] < found["SLO can be met"]


def _typed(case: dict[str, Any]) -> dict[str, Any]:
    return {name: {"True": True, "False": False}.get(value, value) for name, value in case.items()}


def test_plans_and_contexts_that_fail_are_noted(tmp_path: Path) -> None:
    inner = told(1.0, fails="value_bits=4")

    def at(shape: ModelShape, context: int) -> Any:
        if context == CONTEXTS[1]:
            raise RuntimeError("CUDA out of memory")
        return inner(shape, context)

    texts = run_grid(SHAPE, CONTEXTS[:2], "device", tmp_path, lambda text: None, 0, load_calibration(SHAPE), at)
    rows = list(csv.DictReader((tmp_path / "plans.csv").open()))
    failed = [row for row in rows if row["failed"]]
    assert failed and all(row["failed"] == "RuntimeError: CUDA error: out of patience" for row in failed)
    assert all("value_bits=4" in row["residual"] and not row["measured ms"] for row in failed)
    assert {case["context"] for case in cases_of(tmp_path)} == {CONTEXTS[0]}
    assert any("131072 tokens failed" in text for text in texts)


def test_nothing_measured_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="first three plans failed"):
        run_grid(SHAPE, CONTEXTS[:1], "device", tmp_path, lambda text: None, 0, load_calibration(SHAPE), told(1.0, "r"))
