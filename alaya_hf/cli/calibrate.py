"""``alaya-hf calibrate``: measure what the stages of a decode step cost here."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from alaya_hf.cache_argument import cache_argument
from alaya_hf.config import AlayaConfig
from alaya_hf.errors import ConfigError
from alaya_hf.layer import AlayaLayer
from alaya_hf.planner.calibration import (
    Calibration,
    Line,
    calibration_path,
    hardware_name,
    save_calibration,
    shipped_calibration,
)
from alaya_hf.planner.candidates import can_drive
from alaya_hf.planner.cost import layer_seconds
from alaya_hf.planner.layer_plan import LayerPlan
from alaya_hf.planner.measure_host import measure_host, sample_layer, seconds, times, weights_per_second
from alaya_hf.planner.shape import ModelShape
from alaya_hf.query import DIPR, Recovery

_PLANS: dict[str, dict[str, Any]] = {
    "full": {"query": "full", "index": "flat", "residual": "none"},
    "DIPR .003, cap 128 + 4/2": {"query": DIPR(alpha=0.003, cap=128)},
    "DIPR .003 + block means": {"query": DIPR(alpha=0.003), "residual": "block_means"},
    "recovery .95 + 4/2": {"query": Recovery(0.95)},
    "DIPR .003, cap 128, no residual": {"query": DIPR(alpha=0.003, cap=128), "residual": "none"},
}
_REPORTED = (8192, 20480)


def host_step(settings: AlayaConfig, shape: ModelShape, tokens: int, repeats: int = 7) -> tuple[list[float], float]:
    """Seconds of one layer's decode steps with the host engine, and tokens fetched per KV head.

    Parameters
    ----------
    tokens : int
        Context.
    """
    kv, q = sample_layer(shape, tokens)
    layer = AlayaLayer(settings)
    layer.fill(kv[None, :, :, 0], kv[None, :, :, 1])
    query = q.reshape(1, -1, 1, shape.head_dim).to(shape.dtype)
    new = kv[None, :, :1, 0].contiguous()
    scaling = shape.head_dim**-0.5

    def step() -> None:
        layer.update(new, new)
        layer.attend(query, scaling)

    took = times(step, repeats)
    from alaya_hf.probes import Probe

    layer.probe = Probe()
    step()
    return took, layer.probe.steps[-1].fetched


def calibrate(
    shape: ModelShape, quick: bool = False, host: bool = True, advance: Callable[[str], Any] | None = None
) -> Calibration:
    """Measure this machine for layers of a shape.

    Parameters
    ----------
    shape : ModelShape
        On ``cuda`` the device engine is measured, too.
    quick : bool
        Shorter contexts and fewer repetitions, for tests.
    host : bool
        False, with a device to measure: the host engine's costs are those of the package.
    advance : callable, optional
        Told in words what of the device engine is measured next.

    Returns
    -------
    Calibration
        With a report of whole steps, predicted and measured, at lengths that the stages were not measured at.
    """
    lengths, repeats = ((512, 2048), 2) if quick else ((4096, 32768), 7)
    cpu = ModelShape(shape.layers, shape.heads, shape.kv_heads, shape.head_dim, _host_dtype(shape), "cpu")
    driven = can_drive(shape) is None and torch.cuda.is_available()
    host = host or not driven
    if host:
        stages = dict(measure_host(cpu, lengths, repeats))
        weights = {"cpu": weights_per_second(cpu, "cpu", repeats)}
        overhead = {"host": 0.0, "device": 0.0, "eager_cpu": _eager_seconds("cpu", repeats)}
    else:
        known = shipped_calibration()
        stages, weights, overhead = dict(known.host), dict(known.weights), dict(known.layer_overhead)
    device: dict[str, Line] = {}
    report: list[dict[str, Any]] = []
    if driven:
        from alaya_hf.planner.device_case import graph_seconds
        from alaya_hf.planner.measure_device import LENGTHS, REPORTED, measure_device

        device, report = measure_device(
            shape, (4096, 8192) if quick else LENGTHS, (6144,) if quick else REPORTED, advance=advance
        )
        weights["cuda"] = weights_per_second(shape, "cuda", repeats)
        weight = torch.ones(8192, 8192, dtype=shape.dtype, device="cuda")
        row = torch.ones(1, 8192, dtype=shape.dtype, device="cuda")
        product = graph_seconds([lambda: torch.nn.functional.linear(row, weight)] * 4)
        # A step reads its weights in many smaller products with elementwise kernels between them. Measured with a model of the
        # Llama-3-8B shape: 8.1 ms in a graph and about 6 ms with compiled blocks, where the weights alone take 5.4 ms.
        weights["cuda_graph"] = weight.numel() * weight.element_size() / product / 1.5
        weights["cuda_compiled"] = weight.numel() * weight.element_size() / product / 1.1
        overhead["eager_cuda"] = _eager_seconds("cuda", repeats)
    made = Calibration(
        hardware_name(), shape.kv_heads, shape.group, shape.head_dim, str(cpu.dtype), stages, device, overhead, weights,
        False, tuple(report),
    )  # fmt: skip
    if not host:
        return made
    rows = []
    for tokens in (1024, 1536) if quick else _REPORTED:
        for name, changes in _PLANS.items():
            settings = AlayaConfig(window=(64, 256), min_context=0, **changes)
            took, fetched = host_step(settings, cpu, tokens, repeats)
            rows.append((name, tokens, settings, statistics.median(took), fetched))

    def predicted(calibration: Calibration, settings: AlayaConfig, tokens: int, fetched: float) -> float:
        return layer_seconds(LayerPlan.of(settings), cpu, calibration, tokens, 1, fetched)

    gaps = [measured - predicted(made, settings, tokens, fetched) for _, tokens, settings, measured, fetched in rows]
    overhead["host"] = max(0.0, statistics.median(gaps))
    report += [
        {
            "plan": f"host: {name}",
            "context": tokens,
            "predicted": predicted(made, settings, tokens, fetched),
            "measured": measured,
        }
        for name, tokens, settings, measured, fetched in rows
    ]
    return Calibration(
        made.hardware,
        made.kv_heads,
        made.group,
        made.head_dim,
        made.dtype,
        stages,
        device,
        overhead,
        weights,
        False,
        tuple(report),
    )


def _host_dtype(shape: ModelShape) -> torch.dtype:
    return shape.dtype if shape.dtype in (torch.float32, torch.float16, torch.bfloat16) else torch.float32


def _eager_seconds(device: str, repeats: int) -> float:
    """What Transformers' Python and launches take per layer: a step of a model with hardly any arithmetic."""
    from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

    layers = 4
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).to(device).eval()
    cache, ids = DynamicCache(config=config), torch.zeros(1, 1, dtype=torch.int64, device=device)

    def step() -> None:
        with torch.no_grad():
            model(input_ids=ids, **cache_argument(cache))
        if device != "cpu":
            torch.cuda.synchronize()

    return seconds(step, max(3, repeats)) / layers


def run(shape: ModelShape, output: Path | None, quick: bool, host: bool = True) -> tuple[Calibration, Path]:
    """Measure and write; returns what was measured and where it is.

    Raises
    ------
    ConfigError
        If a GPU's costs were asked for and there is none.
    """
    if shape.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "the device engine's costs cannot be measured here: there is no CUDA device. Use --device cpu for the host engine's."
        )
    made = calibrate(shape, quick, host)
    path = output or calibration_path(shape)
    save_calibration(made, path)
    return made, path
