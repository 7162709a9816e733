"""What the device engine's calibration and the planner's grid run, in Triton's interpreter."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from alaya_hf.kernels.gpu.store_format import StoreFormat
from alaya_hf.planner import ModelShape
from alaya_hf.planner.calibration import DEVICE_STAGES
from alaya_hf.planner.measure_host import sample_layer
from tests.interpreted import INTERPRETED, run_cases

SHAPE = ModelShape(1, 4, 2, 32, torch.float16, "cuda")


@pytest.mark.skipif(INTERPRETED, reason="runs the others")
def test_in_interpreter() -> None:
    run_cases(__file__)


def sampled(shape: ModelShape, tokens: int) -> Any:
    row, q = sample_layer(shape, tokens)
    keys, values = (row[None, :, :, side].contiguous() for side in (0, 1))
    return keys, values, q.reshape(1, -1, shape.head_dim).to(shape.dtype)


@pytest.mark.skipif(not INTERPRETED, reason="runs inside test_in_interpreter")
@pytest.mark.parametrize("dtype", [torch.float16, torch.int8])
@pytest.mark.parametrize("bits", [(4, 2), (4, 0)])
def test_case_of_a_calibration(dtype: torch.dtype, bits: tuple[int, int]) -> None:
    """Stages run on what a step left, one after the other, and come to the step; all turns fetch as many tokens."""
    from alaya_hf.planner.device_case import DeviceContext

    context = DeviceContext(*sampled(SHAPE, 1000), StoreFormat(32, dtype), turns=2)
    cases = context.cases(bits, 16, math.inf, 0.98)
    out = cases[0].step().clone()
    assert cases[0].fetched > 0
    for stage in cases[0].stages().values():
        stage()
    assert torch.allclose(cases[0].work.out.float(), out.float(), atol=1e-2)
    cases[0].work.best.fill_(-math.inf)
    fetched = cases[0].fetched
    cases[1].step()
    assert cases[1].fetched == fetched


@pytest.mark.skipif(not INTERPRETED, reason="runs inside test_in_interpreter")
def test_case_of_a_step_that_keeps_everything() -> None:
    """Window, ring, store and low-bit copy hold what the exact attention reads."""
    from alaya_hf.planner.device_case import DeviceContext

    context = DeviceContext(*sampled(SHAPE, 900), StoreFormat(32, torch.float16), turns=1)
    exact = context.exact()
    assert context.error(context.cases((4, 4), 512, math.inf, 0.9999)[0].step(), exact) < 0.005
    assert context.error(context.cases((4, 0), 8, math.inf, 0.5)[0].step(), exact) > 0.01


@pytest.mark.skipif(not INTERPRETED, reason="runs inside test_in_interpreter")
def test_case_of_costs_of_every_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a timer that calls and gives a made-up time: every stage gets a line, and steps are reported."""
    from alaya_hf.planner import measure_device

    runs = measure_device._RUNS
    named = {f"pass{bits[0]}{bits[1]}" for bits, *_ in runs} | {
        measure_device._cut(cap, ratio) for _, cap, ratio in runs
    }
    assert named == {name for name in DEVICE_STAGES if name.startswith(("pass", "cut", "share"))}
    # In the interpreter a step takes seconds: two stand for all.
    monkeypatch.setattr(measure_device, "_RUNS", (((4, 2), 32, 1.0), ((4, 2), 32, 0.98)))
    monkeypatch.setattr(measure_device, "_RUNS_EIGHT", (((4, 2), 32, 1.0),))
    monkeypatch.setattr(measure_device, "sample_context", sampled)

    def timed(calls: Any, repeats: int) -> list[float]:
        for call in calls[:1]:
            call()
        # A whole step takes more than its stages together, and is at times slow.
        return [1e-4] * repeats if repeats < 40 else [1e-3] * 36 + [2e-3] * 4

    said: list[str] = []
    lines, report = measure_device.measure_device(SHAPE, (800, 1000), (), 1, timed, said.append)
    assert {"window", "dense", "pass42", "scores", "cut32", "share32", "gather", "gather8", "merge"} < set(lines)
    assert {name.partition("@")[0] for name in set(lines) - set(DEVICE_STAGES)} == {
        "gather", "gather8", "gather_tail", "gather8_tail",
    }  # fmt: skip
    assert len(report) == len(said)
    # What stages do not explain is fetching's: steps are predicted as they were measured.
    assert all(
        row["predicted"] == pytest.approx(1e-3) and row["predicted_tail"] == pytest.approx(2e-3) for row in report
    )
    assert any("share 0.98, cap 32" in row["plan"] for row in report) and all(row["cap"] == 32 for row in report)


@pytest.mark.skipif(not INTERPRETED, reason="runs inside test_in_interpreter")
def test_case_of_the_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans of a device layer are run, compared with exact attention, timed and counted."""
    from alaya_hf import AlayaConfig, LowBit, Quantized, Recovery, WindowConfig
    from alaya_hf.planner import device_case
    from alaya_hf.planner.layer_plan import LayerPlan
    from alaya_hf.planner.memory import device_bytes
    from eval import planner_grid

    monkeypatch.setattr(device_case, "sample_context", sampled)
    monkeypatch.setattr(device_case, "graph_times", lambda calls, repeats: [calls[0]() is None or 1e-4] * repeats)
    monkeypatch.setattr(planner_grid, "_buffers_on", lambda shape: "cpu")
    assert planner_grid.check(SHAPE, 900) < 0.05
    measure, profile = planner_grid.on_device(SHAPE, 1000)
    plan = LayerPlan("device", Recovery(0.98, 128), Quantized(4, 0.0), LowBit(4, 2), WindowConfig(128, 512), 0)
    found = measure(plan)
    assert found.error is not None and found.error < 0.3 and found.seconds == 1e-4
    assert found.layer_bytes is not None and found.layer_bytes <= device_bytes(plan, SHAPE, 1000, 1)
    assert profile.layers[0][0].tokens[-1] > profile.layers[0][0].tokens[0]
    assert AlayaConfig(**plan.settings()).engine == "device"
