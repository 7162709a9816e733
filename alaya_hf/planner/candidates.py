"""Plans that the planner considers for a layer."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from alaya_hf.config import AlayaConfig, WindowConfig
from alaya_hf.engine.device.plan import MAX_CAP, device_plan
from alaya_hf.engine.residual import BlockMean, LowBit, NoResidual
from alaya_hf.errors import ConfigError
from alaya_hf.index import Quantized
from alaya_hf.planner.layer_plan import LayerPlan
from alaya_hf.planner.shape import ModelShape
from alaya_hf.query import DIPR, Full, Recovery

#: Windows, the largest that fits is taken; the first is the paper's (arXiv 2504.10326, section 9).
WINDOWS = tuple(WindowConfig(*sizes) for sizes in ((128, 512, 256), (64, 256, 64), (16, 64, 16), (4, 16, 4)))
_CAPS = (32, 128, 256, MAX_CAP)
_RATIOS = (0.9, 0.95, 0.98, 0.99, 0.995)


def can_drive(shape: ModelShape) -> str | None:
    """Why the device engine cannot serve a model here; None: it can."""
    if shape.device != "cuda":
        return f"the model is on {shape.device}"
    if shape.dtype not in (torch.bfloat16, torch.float16):
        return f"the model's keys are {shape.dtype}"
    if shape.capped:
        return "its logits are capped or its heads have sinks"
    if shape.head_dim % 16 or shape.head_dim > 256:
        return f"head dimension {shape.head_dim} is not a multiple of 16 up to 256"
    if importlib.util.find_spec("triton") is None:
        return "there is no Triton"
    return None


def engines(settings: AlayaConfig, shape: ModelShape) -> list[str]:
    """Engines to plan for."""
    if "engine" in settings.given:
        return [settings.engine]
    if settings.on_doubt != "ignore" or settings.store_dtype == "float32" or can_drive(shape) is not None:
        return ["host"]
    return ["device", "host"]


def windows(settings: AlayaConfig) -> list[tuple[WindowConfig, int]]:
    """Windows and lengths up to which a context stays in it as a whole, in the order to try them."""
    found: list[tuple[WindowConfig, int]] = []
    for window in [settings.window] if "window" in settings.given else WINDOWS:
        whole = [settings.min_context] if "min_context" in settings.given else [settings.min_context, 0]
        found += [(window, length) for length in whole]
    return found


def _queries(settings: AlayaConfig, engine: str) -> list[Any]:
    if "query" in settings.given:
        return [settings.query]
    target = settings.recovery
    ratios = [target] if target is not None else []
    ratios += [ratio for ratio in _RATIOS if target is None or ratio > target]
    if engine == "device":
        found: list[Any] = [Recovery(ratio, cap) for ratio in ratios for cap in _CAPS]
        return [*found, DIPR(alpha=0.012, cap=32), DIPR(alpha=0.003, cap=128), DIPR(alpha=0.001, cap=MAX_CAP)]
    found = [Recovery(ratio) for ratio in ratios]
    return [*found, DIPR(alpha=0.003, cap=128), DIPR(alpha=0.012), DIPR(alpha=0.003), DIPR(alpha=0.001), Full()]


def _pairs(settings: AlayaConfig, engine: str, head_dim: int) -> list[tuple[Any, Any]]:
    given = settings.given
    quantisable = head_dim % 16 == 0
    if "index" in given:
        indexes = [settings.index]
    elif quantisable:
        indexes = [Quantized(bits=4, margin=0.0)]
    else:
        from alaya_hf.index import Flat

        indexes = [Flat()]
    if "residual" in given:
        residuals = [settings.residual]
    else:
        residuals = [BlockMean(block=32)]
        residuals += [LowBit(4, 2), LowBit(4, 4)] if quantisable else []
        residuals += [NoResidual()] if engine == "host" else []
    pairs = []
    for index in indexes:
        for residual in residuals:
            # Means of keys want smaller blocks than means of values under scores of single tokens.
            fits = isinstance(residual, BlockMean) and "residual" not in given and not index.scores_all
            pairs.append((index, replace(residual, block=16) if fits else residual))
    return pairs


def candidates(
    settings: AlayaConfig, layer: int, shape: ModelShape, engine: str, window: WindowConfig, min_context: int,
    store_dtype: str = "auto",
) -> Iterator[LayerPlan]:  # fmt: skip
    """Plans for a layer, those that its settings allow and the engine serves.

    Parameters
    ----------
    settings : AlayaConfig
        Of the whole model; what is given there and in ``layers`` stays.
    layer : int
        Its number in the model.
    engine, window, min_context, store_dtype
        As chosen for the layers together.
    """
    own = settings.for_layer(layer)
    if own.given & {"engine"}:
        engine = own.engine
    plan = LayerPlan(
        engine, Full(), own.index, own.residual,
        own.window if "window" in own.given else window,
        own.min_context if "min_context" in own.given else min_context,
        own.store_dtype if "store_dtype" in own.given else store_dtype,
    )  # fmt: skip
    if layer in own.dense_layers:
        yield plan.because("dense layer, as given")
        return
    for index, residual in _pairs(own, engine, shape.head_dim):
        for query in _queries(own, engine):
            found = replace(plan, query=query, index=index, residual=residual)
            try:
                index.check(query)
                residual.check(index)
                if engine == "device":
                    device_plan(own.replace(**found.settings(), layers={}), layer)
            except ConfigError:
                continue
            yield found
