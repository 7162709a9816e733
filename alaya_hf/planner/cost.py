"""Seconds of a decode step, from the costs of its stages."""

from __future__ import annotations

from collections.abc import Mapping

from alaya_hf.engine.residual import BlockMean, LowBit
from alaya_hf.index import Coarse, Flat, Graph, Quantized
from alaya_hf.planner.calibration import CUT_CAPS, Calibration
from alaya_hf.planner.layer_plan import LayerPlan
from alaya_hf.planner.memory import exact_cap
from alaya_hf.planner.shape import ModelShape
from alaya_hf.query import DIPR, Recovery


def layer_seconds(
    plan: LayerPlan, shape: ModelShape, calibration: Calibration, context: int, batch: int, fetched: float,
    correction: Mapping[str, float] | None = None, tail: bool = False,
) -> float:  # fmt: skip
    """Attention of one layer in one decode step.

    Parameters
    ----------
    plan : LayerPlan
    shape : ModelShape
    calibration : Calibration
    context : int
    batch : int
    fetched : float
        Offloaded tokens read per KV head and row.
    correction : mapping, optional
        Engine -> factor that measured steps came to.
    tail : bool
        The 95th percentile of steps instead of what they take as a rule, where the calibration knows it: of what the device
        engine reads over the bus.

    Returns
    -------
    float
        ``inf`` for a plan on the device if nothing is known of one.
    """
    factor = 1.0 if correction is None else correction.get(plan.engine, 1.0)
    short = context <= plan.min_context
    window = context if short else plan.window.init + plan.window.local
    offloaded = 0 if short else max(0, context - window)
    overhead = calibration.layer_overhead
    if plan.engine == "device":
        if not calibration.device:
            return float("inf")
        stages = _device_stages(plan, calibration, window, offloaded, fetched, tail)
        # Rows and heads share the device: its stages grow with the bytes of all of them.
        scale = shape.kv_heads * shape.head_dim / (calibration.kv_heads * calibration.head_dim) * batch
        seconds = sum(fixed + per * scale for fixed, per in stages) + overhead["device"]
        return factor * seconds
    stages = _host_stages(plan, calibration, window, offloaded, fetched)
    scale = shape.heads * shape.head_dim / (calibration.kv_heads * calibration.group * calibration.head_dim)
    return factor * (sum(fixed + per * scale for fixed, per in stages) * batch + overhead["host"])


def _host_stages(
    plan: LayerPlan, costs: Calibration, window: int, offloaded: int, fetched: float
) -> list[tuple[float, float]]:
    def stage(name: str, tokens: float) -> tuple[float, float]:
        line = costs.host[name]
        return line.fixed, line.growth(tokens)

    parts = [stage("window", window)]
    if not offloaded:
        return parts
    if plan.query.keeps_all:
        return [*parts, stage("dense", offloaded)]
    index, residual = plan.index, plan.residual
    if isinstance(index, Quantized):
        parts += [stage(f"scan{index.bits}", offloaded), stage("select", offloaded)]
        if index.margin:
            parts.append(stage("gather", 2 * fetched))
    elif isinstance(index, Flat):
        parts += [stage("flat", offloaded), stage("select", offloaded)]
    elif isinstance(index, Graph):
        parts.append(stage("graph", 12 * fetched))
    elif isinstance(index, Coarse):
        parts.append(stage("flat", offloaded / index.block * index.count))
    else:  # sign codes and what is registered later: like the narrowest scan
        parts += [stage("scan2", offloaded), stage("select", offloaded)]
    if index.scores_all:
        parts.append(stage("cut_recovery" if isinstance(plan.query, Recovery) else "cut", offloaded))
    parts.append(stage("gather", fetched))
    if isinstance(residual, LowBit):
        parts.append(stage(f"values{residual.value_bits}", offloaded))
    elif isinstance(residual, BlockMean):
        keyed = residual.keys is True or not index.scores_all
        parts.append(stage("key_means" if keyed else "means", offloaded * (16 / residual.block if keyed else 1)))
    return parts


def _device_stages(
    plan: LayerPlan, costs: Calibration, window: int, offloaded: int, fetched: float, tail: bool
) -> list[tuple[float, float]]:
    def stage(name: str, tokens: float) -> tuple[float, float]:
        line = costs.device[name]
        return line.fixed, line.growth(tokens)

    read = costs.gather("gather8" if plan.store_dtype in ("int8", "fp8") else "gather", fetched, offloaded, tail)
    if isinstance(plan.index, Coarse):
        # Not measured: a block's vectors take about as long to read as the low-bit copy of two or four tokens.
        vectors = (2 if plan.index.strategy == "bounds" else 1) + isinstance(plan.residual, BlockMean)
        blocks = offloaded / plan.index.block
        scores = [stage(_cut_stage(plan), blocks), stage("pass82", 2 * vectors * blocks)]
        return [stage("window", window), stage("merge", 0), *scores, read]
    bits = plan.residual.value_bits if isinstance(plan.residual, LowBit) else 0
    name = f"pass{plan.index.bits}{bits}"
    parts = [stage("window", window), stage("merge", 0), stage(_cut_stage(plan), offloaded)]
    if not isinstance(plan.query, DIPR):
        parts.append(stage("scores", offloaded))
    return [*parts, read, stage(name if name in costs.device else "pass82", offloaded)]


def cut_cap(plan: LayerPlan) -> int:
    """The smallest cap measured that holds the tokens which a plan of the device engine selects per query head."""
    cap = exact_cap(plan)
    return next((size for size in CUT_CAPS if size >= cap), CUT_CAPS[-1])


def _cut_stage(plan: LayerPlan) -> str:
    """The stage that selects for a plan."""
    return f"{'share' if isinstance(plan.query, Recovery) else 'cut'}{cut_cap(plan)}"


def model_seconds(shape: ModelShape, calibration: Calibration, engine: str, graphs: str) -> float:
    """A decode step without attention: reading the weights, and what Python and launches add.

    Parameters
    ----------
    shape : ModelShape
    calibration : Calibration
    engine : {"host", "device"}
    graphs : {"capture", "compile", "none"}
        The setting ``cuda_graphs``; only the device engine's steps are captured.
    """
    name = shape.device if shape.device in calibration.weights else "cpu"
    if engine == "device" and graphs != "none" and "cuda_graph" in calibration.weights:
        name = "cuda_compiled" if graphs == "compile" and "cuda_compiled" in calibration.weights else "cuda_graph"
    width = shape.dtype.itemsize
    seconds = shape.parameters * width / calibration.weights[name]
    if not name.startswith("cuda_"):
        seconds += shape.layers * calibration.layer_overhead.get(f"eager_{name}", 0.0)
    return seconds
