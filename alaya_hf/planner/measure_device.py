"""What the stages of the device engine cost here: kernels over one row of one layer, each replayed as a CUDA graph."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from alaya_hf.kernels.gpu.store_format import StoreFormat
from alaya_hf.planner.calibration import CUT_CAPS, Line
from alaya_hf.planner.device_case import INIT, LOCAL, DeviceCase, DeviceContext, graph_seconds, sample_context
from alaya_hf.planner.measure_host import fit, fit_bent
from alaya_hf.planner.shape import ModelShape

#: Tokens at which stages are timed; the longest one where the device has room for it.
LENGTHS = (16384, 131072, 524288)
_BETA, _SHARE = -math.log(0.003), 0.98
#: Bits, cap and share (1: a range) of the steps that are timed; the first one of its bits gives the pass.
_RUNS = (
    *(((4, 2), cap, ratio) for ratio in (1.0, _SHARE) for cap in CUT_CAPS),
    *((bits, 32, 1.0) for bits in ((4, 4), (4, 0), (8, 2))),
    *((bits, 128, _SHARE) for bits in ((4, 4), (4, 0))),
)
_RUNS_EIGHT = (((4, 2), 32, 1.0), ((4, 2), CUT_CAPS[-1], 1.0))


def measure_device(
    shape: ModelShape, lengths: tuple[int, ...] = LENGTHS, turns: int | None = None,
    seconds: Callable[..., float] = graph_seconds, advance: Callable[[str], Any] | None = None,
) -> tuple[dict[str, Line], list[dict[str, Any]]]:  # fmt: skip
    """Costs of the device engine's stages, see :data:`~alaya_hf.planner.calibration.DEVICE_STAGES`.

    Parameters
    ----------
    shape : ModelShape
        On ``cuda``, in a half precision.
    lengths : tuple of int
        Tokens, at least two, ascending; those for which the device has no room are left out, but for the first two.
    turns : int, optional
        Copies of the layer that take turns, see :class:`~alaya_hf.planner.device_case.DeviceContext`.
    seconds : callable
        Times a list of calls, one per turn.
    advance : callable, optional
        Told in words what is measured next.

    Returns
    -------
    stages : dict of str to Line
    report : list of dict
        Whole steps of one layer: ``plan``, ``context``, ``predicted`` (the sum of the stages) and ``measured``, seconds.

    Notes
    -----
    Some ten seconds with the default lengths, and as long as it takes to compile the kernels where they are new.
    """
    lengths = tuple(n for i, n in enumerate(lengths) if i < 2 or _has_room(shape, n))
    points: dict[str, list[tuple[float, float]]] = {}
    wholes: list[_Whole] = []
    whole_keys, whole_values, query = sample_context(shape, max(lengths))
    for tokens in lengths:
        keys, values = whole_keys[:, :, :tokens], whole_values[:, :, :tokens]
        attend = torch.nn.functional.scaled_dot_product_attention
        dense = [partial(attend, query.unsqueeze(2), keys.clone(), values.clone(), enable_gqa=True) for _ in range(3)]
        points.setdefault("dense", []).append((tokens, seconds(dense)))
        del dense
        for gathered, dtype, runs in (("gather", shape.dtype, _RUNS), ("gather8", torch.int8, _RUNS_EIGHT)):
            context = DeviceContext(keys, values, query, StoreFormat(shape.head_dim, dtype), turns)
            for bits, cap, ratio in runs:
                if advance is not None:
                    advance(f"{tokens} tokens, {bits[0]}-bit keys, {bits[1]}-bit values, cap {cap}, {dtype}")
                beta = math.inf if ratio < 1 else _BETA * shape.head_dim**0.5
                cases = context.cases(bits, cap, beta, ratio)
                wholes.append(_measure_run(points, cases, gathered, context.low_tokens, cap, seconds))
            del context, cases
    once = ("window", "merge")
    bent = ("gather", "gather8")
    lines = {name: (fit_bent if name in bent else fit)(found) for name, found in points.items() if name not in once}
    for name in once:
        lines[name] = Line(statistics.median(s for _, s in points[name]), 0.0)
    # Stages overlap, and a graph saves launches between them: what whole steps differ by goes into the fixed part.
    shift = statistics.median(whole.measured - whole.predicted(lines) for whole in wholes)
    lines["merge"] = Line(max(0.0, lines["merge"].fixed + shift), 0.0)
    report = [
        {"plan": whole.name, "context": whole.context, "predicted": whole.predicted(lines), "measured": whole.measured}
        for whole in wholes
    ]
    return lines, report


def _has_room(shape: ModelShape, tokens: int) -> bool:
    """Whether the device holds the keys and values of so many tokens some eight times over."""
    return torch.cuda.mem_get_info()[0] > 8 * tokens * shape.token_bytes


class _Whole:
    """A whole step: the stages that it consists of, with their tokens, and what it took."""

    def __init__(self, name: str, context: int, stages: dict[str, float], measured: float) -> None:
        self.name, self.context, self.stages, self.measured = name, context, stages, measured

    def predicted(self, lines: dict[str, Line]) -> float:
        return sum(lines[name](tokens) for name, tokens in self.stages.items())


def _measure_run(
    points: dict[str, list[tuple[float, float]]], cases: list[DeviceCase], gathered: str, tokens: int, cap: int,
    seconds: Callable[..., float],
) -> _Whole:  # fmt: skip
    """Time a step and those of its stages that are not known yet at this length."""
    bits, ratio = cases[0].bits, cases[0].ratio
    passed, cut = f"pass{bits[0]}{bits[1]}", f"{'share' if ratio < 1 else 'cut'}{cap}"
    for case in cases:
        case.step()
    fetched = cases[0].fetched
    for (
        case
    ) in cases:  # a step ends with its buffers made ready for the next one: what the stages read has to be there again
        stages = case.stages()
        stages["window"]()
        stages["pass"]()

    def note(name: str, at: float, stage: str) -> float:
        took = seconds([case.stages()[stage] for case in cases])
        points.setdefault(name, []).append((at, took))
        return took

    def known(name: str) -> bool:
        return any(at == tokens for at, _ in points.get(name, []))

    if gathered == "gather":
        if not known(passed) and ratio == 1:
            note("window", INIT + LOCAL, "window")
            note(passed, tokens, "pass")
            note("merge", 1, "merge")
        if bits == (4, 2) and ratio < 1 and not known("scores"):
            ranged = next(took for at, took in points[passed] if at == tokens)
            took = seconds([case.stages()["pass"] for case in cases])
            points.setdefault("scores", []).append((tokens, max(1e-9, took - ranged)))
        if not known(cut):
            note(cut, tokens, "cut")
    # The lists that the gather reads are those of the cut.
    for case in cases:
        case.stages()["cut"]()
    note(gathered, fetched, "gather")
    for case in cases:
        case.stages()["merge"]()
        case.work.best.fill_(-math.inf)
    parts = {"window": 0.0, "merge": 0.0, passed: tokens, cut: tokens, gathered: fetched}
    if ratio < 1:
        parts["scores"] = tokens
    name = f"{bits[0]}-bit keys, {bits[1]}-bit values, {f'share {ratio:g}' if ratio < 1 else 'range'}, cap {cap}"
    whole = seconds([case.step for case in cases])
    return _Whole(name + (", 8-bit store" if gathered == "gather8" else ""), tokens, parts, whole)
