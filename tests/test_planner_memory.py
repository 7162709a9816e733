"""The planner's bounds of memory against what the device engine allocates, and its commands."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from alaya_hf import DIPR, AlayaConfig, LowBit, Quantized, Recovery, TopK, WindowConfig
from alaya_hf.cli import app
from alaya_hf.device_layer import DeviceLayer
from alaya_hf.errors import ConfigError
from alaya_hf.planner import ModelShape
from alaya_hf.planner.calibration import Calibration, load_calibration
from alaya_hf.planner.layer_plan import LayerPlan
from alaya_hf.planner.memory import device_bytes, workspace_bytes

SHAPE = ModelShape(2, 8, 2, 64, torch.bfloat16, "cuda")
NUMBERS = ["--layers", "4", "--heads", "8", "--kv-heads", "2", "--head-dim", "64"]


def device_plan_of(cap: int, value_bits: int, init: int, local: int, min_context: int) -> LayerPlan:
    residual: Any = LowBit(4, value_bits) if value_bits else AlayaConfig(residual="block_means").residual
    return LayerPlan(
        "device", Recovery(0.9, cap), Quantized(4, 0.0), residual, WindowConfig(init, local), min_context, "auto"
    )


@settings(max_examples=30)
@given(
    cap=st.sampled_from([1, 32, 128, 512]), bits=st.sampled_from([0, 2, 4]), init=st.sampled_from([0, 16, 128]),
    local=st.sampled_from([16, 512]), new=st.sampled_from([1, 5, 64]), whole=st.sampled_from([0, 2048]),
    context=st.integers(1, 30_000), batch=st.integers(1, 3),
)  # fmt: skip
def test_bounds_of_the_device_engine(
    cap: int, bits: int, init: int, local: int, new: int, whole: int, context: int, batch: int
) -> None:
    pytest.importorskip("triton")
    from alaya_hf.engine.device.tokens import DeviceTokens
    from alaya_hf.kernels.gpu.layout import Layout
    from alaya_hf.kernels.gpu.step import Workspace

    plan, device, layout = device_plan_of(cap, bits, init, local, whole), torch.device("cpu"), Layout(64, 4, bits)
    tokens = DeviceTokens(batch, 2, layout, plan.window, whole, torch.bfloat16, device)
    ring, low = tokens._ring_for(context), tokens._low_for(context, context)
    if ring != tokens.ring:
        tokens._resize_ring(ring)
    # As a context that came in one piece holds it, and as one that grew by single tokens does.
    tokens.reserve(1, max(0, low - 64))
    tokens.reserve(1, low, 1, context)
    assert tokens.window_bytes + tokens.lowbit_bytes <= device_bytes(plan, SHAPE, context, batch)
    from alaya_hf.kernels.gpu.short_pass import positions_at_a_time

    sizes = (batch, 2, 4, layout, tokens.room, init + ring, cap, device, torch.bfloat16, None)
    share = positions_at_a_time(batch, 8, tokens.room, new)
    held = sum(Workspace(*sizes, *several).nbytes for several in {(1, 1), (new, share)})
    assert held <= workspace_bytes(plan, SHAPE, context, batch, new)


@settings(max_examples=20)
@given(
    block=st.sampled_from([16, 128, 512]), strategy=st.sampled_from(["mean", "bounds", "representatives"]),
    k=st.sampled_from([0, 100, 2048]), local=st.sampled_from([16, 512]), whole=st.sampled_from([0, 2048]),
    context=st.integers(1, 30_000), batch=st.integers(1, 3),
)  # fmt: skip
def test_bounds_of_blocks_on_the_device(
    block: int, strategy: str, k: int, local: int, whole: int, context: int, batch: int
) -> None:
    pytest.importorskip("triton")
    from alaya_hf.engine.device.plan import device_plan
    from alaya_hf.engine.device.tokens import DeviceTokens
    from alaya_hf.kernels.gpu.coarse_step import CoarseWorkspace

    residual = {"kind": "block_means", "block": block} if strategy == "mean" else "none"
    config = AlayaConfig(
        query=TopK(k), index={"kind": "coarse", "block": block, "strategy": strategy}, residual=residual, window=(16, local),
        min_context=whole, engine="device",
    )  # fmt: skip
    asked, plan = device_plan(config, 0), LayerPlan.of(config)
    layout, device = asked.layout(64), torch.device("cpu")
    tokens = DeviceTokens(batch, 2, layout, plan.window, whole, torch.bfloat16, device)
    ring, low = tokens._ring_for(context), tokens._low_for(context, context)
    if ring != tokens.ring:
        tokens._resize_ring(ring)
    tokens.reserve(1, max(0, low - 64))
    tokens.reserve(1, low, 1, context)
    assert tokens.window_bytes + tokens.index_bytes <= device_bytes(plan, SHAPE, context, batch)
    work = CoarseWorkspace(batch, 2, 4, layout, tokens.room, 16 + ring, asked.cap, device, torch.bfloat16)
    assert work.nbytes <= workspace_bytes(plan, SHAPE, context, batch, 64)


def test_a_device_layer_changes_its_query_but_not_its_copy() -> None:
    base = AlayaConfig(engine="device", query=DIPR(alpha=0.012, cap=32))
    layer = DeviceLayer(base)
    layer.change_query(base.replace(query=DIPR(alpha=0.003, cap=128)))
    assert layer.plan.cap == 128 and layer.plan.dipr == DIPR(alpha=0.003, cap=128)
    with pytest.raises(ConfigError, match="with_config"):
        layer.change_query(base.replace(residual={"kind": "low_bit", "value_bits": 4}))


def test_explain_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    wanted = ["explain", *NUMBERS, "--context", "131072", "--slo", "20ms", "--gpu-memory", "1GiB", "--device", "cuda"]
    shown = CliRunner().invoke(app, wanted)
    assert shown.exit_code == 0 and "slo 20ms" in shown.output and "shipped" in shown.output
    data = json.loads(CliRunner().invoke(app, [*wanted, "--json", "--set", "query=topk"]).output)
    assert {row["query"] for row in data["layers"]} == {"topk"}
    assert sum(row["estimated"]["device_bytes"] for row in data["layers"]) <= 1 << 30
    bad = CliRunner().invoke(app, ["explain", "--layers", "4"])
    assert bad.exit_code == 2 and "--kv-heads" in bad.output
    small = CliRunner().invoke(app, ["explain", *NUMBERS, "--gpu-memory", "1KiB"])
    assert small.exit_code == 2 and "Allow at least" in small.output


def test_calibrate_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """What is measured is found again for such layers, and explains itself."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    numbers = ["--layers", "2", "--heads", "4", "--kv-heads", "2", "--head-dim", "16", "--dtype", "float32"]
    shown = CliRunner().invoke(app, ["calibrate", *numbers, "--device", "cpu", "--quick"])
    assert shown.exit_code == 0 and "median error" in shown.output
    shape = ModelShape(2, 4, 2, 16, torch.float32)
    made = load_calibration(shape)
    assert not made.reference and len(made.report) > 4 and made == Calibration.from_json(made.to_json())
    assert load_calibration(ModelShape(2, 8, 2, 16, torch.float32)).reference
