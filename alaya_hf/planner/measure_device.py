"""What the stages of the device engine cost here: kernels over one row of one layer, each replayed as a CUDA graph."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from alaya_hf.kernels.gpu.store_format import StoreFormat
from alaya_hf.planner.calibration import CUT_CAPS, Gathers, Line
from alaya_hf.planner.device_case import INIT, LOCAL, DeviceCase, DeviceContext, graph_times, sample_context
from alaya_hf.planner.measure_host import fit, fit_bent
from alaya_hf.planner.shape import ModelShape

#: Tokens at which stages are timed; the longest one where the device has room for it.
LENGTHS = (16384, 131072, 524288)
#: Tokens at which whole steps alone are timed, to see how far off the costs are.
REPORTED = (49152, 393216)
_BETA, _SHARE = -math.log(0.003), 0.98
#: A share that takes all that a cap allows: what costs the most to fetch.
_MOST = 0.9999
#: Bits, cap and share (1: a range) of the steps that are timed; the first one of its bits gives the pass.
_RUNS = (
    *(((4, 2), cap, ratio) for ratio in (1.0, _SHARE) for cap in CUT_CAPS),
    *((bits, 32, 1.0) for bits in ((4, 4), (4, 0), (8, 2))),
    *((bits, 128, _SHARE) for bits in ((4, 4), (4, 0))),
    *(((4, 2), cap, _MOST) for cap in CUT_CAPS[-2:]),
)
_RUNS_EIGHT = (((4, 2), 32, 1.0), ((4, 2), CUT_CAPS[-1], 1.0), *(((4, 2), cap, _MOST) for cap in CUT_CAPS[1:]))
#: Replays of a whole step: enough for a 95th percentile.
_REPEATS = 40
_STAGE_REPEATS = 11
_GATHERS = ("gather", "gather8")
_LEAST = 1e-9  # seconds: what measured differences may be too small for


def measure_device(
    shape: ModelShape, lengths: tuple[int, ...] = LENGTHS, reported: tuple[int, ...] = REPORTED, turns: int | None = None,
    timed: Callable[..., list[float]] = graph_times, advance: Callable[[str], Any] | None = None,
) -> tuple[dict[str, Line], list[dict[str, Any]]]:  # fmt: skip
    """Costs of the device engine's stages, see :data:`~alaya_hf.planner.calibration.DEVICE_STAGES`.

    Parameters
    ----------
    shape : ModelShape
        On ``cuda``, in a half precision.
    lengths : tuple of int
        Tokens, at least two; those for which the device has no room are left out, but for the first two.
    reported : tuple of int
        Tokens of the report; those for which the device has no room are left out.
    turns : int, optional
        Copies of the layer that take turns, see :class:`~alaya_hf.planner.device_case.DeviceContext`.
    timed : callable
        Times a list of calls, one per turn, some number of times: seconds of one of them, each time.
    advance : callable, optional
        Told in words what is measured next.

    Returns
    -------
    stages : dict of str to Line
    report : list of dict
        Whole steps of one layer: ``plan``, ``context``, ``cap``, ``predicted`` (the sum of the stages) and ``measured``, seconds,
        and the 95th percentile of both, ``predicted_tail`` and ``tail``.

    Notes
    -----
    What fetching costs is what whole steps take beyond their other stages: a gather that is timed by itself finds the
    translations of its rows' addresses ready, where a step has read a context's worth of other memory since.

    Some twenty seconds with the default lengths, and as long as it takes to compile the kernels where they are new.
    """
    lengths = tuple(n for i, n in enumerate(lengths) if i < 2 or _has_room(shape, n))
    reported = tuple(n for n in reported if _has_room(shape, n))
    points: dict[str, list[tuple[float, float]]] = {}
    wholes: list[_Whole] = []
    others: list[_Whole] = []
    whole_keys, whole_values, query = sample_context(shape, max(lengths + reported))
    attend = torch.nn.functional.scaled_dot_product_attention
    for tokens in lengths + reported:
        keys, values = whole_keys[:, :, :tokens], whole_values[:, :, :tokens]
        if tokens in lengths:
            dense = [
                partial(attend, query.unsqueeze(2), keys.clone(), values.clone(), enable_gqa=True) for _ in range(3)
            ]
            points.setdefault("dense", []).append((tokens, statistics.median(timed(dense, _STAGE_REPEATS))))
            del dense
        for gathered, dtype, runs in (("gather", shape.dtype, _RUNS), ("gather8", torch.int8, _RUNS_EIGHT)):
            context = DeviceContext(keys, values, query, StoreFormat(shape.head_dim, dtype), turns)
            for bits, cap, ratio in runs:
                if advance is not None:
                    advance(f"{tokens} tokens, {bits[0]}-bit keys, {bits[1]}-bit values, cap {cap}, {dtype}")
                beta = math.inf if ratio < 1 else _BETA * shape.head_dim**0.5
                cases = context.cases(bits, cap, beta, ratio)
                if tokens in lengths and gathered == "gather":
                    _measure_stages(points, cases, context.low_tokens, cap, timed)
                whole = _measure_whole(cases, gathered, context.low_tokens, cap, timed)
                (wholes if tokens in lengths else others).append(whole)
            del context, cases
    once = ("window", "merge")
    lines = {name: fit(found) for name, found in points.items() if name not in once}
    for name in once:
        lines[name] = Line(statistics.median(s for _, s in points[name]), 0.0)
    lines |= _gathers(wholes, lines)
    lines |= {name: _gather(fit, name, wholes, lines) for name in _GATHERS}
    gathers = Gathers(lines)
    return lines, [whole.report(lines, gathers) for whole in others or wholes]


def _gathers(wholes: Sequence[_Whole], lines: Mapping[str, Line]) -> dict[str, Line]:
    """What fetching costs at each context, as a rule and at the 95th percentile."""
    found = {}
    for context in dict.fromkeys(whole.context for whole in wholes):
        here = [whole for whole in wholes if whole.context == context]
        for name in _GATHERS:
            found[f"{name}@{context}"] = _gather(fit_bent, name, here, lines)
            found[f"{name}_tail@{context}"] = _gather(fit_bent, name, here, lines, tail=True)
    return found


def _gather(
    through: Callable[..., Line], name: str, wholes: Sequence[_Whole], lines: Mapping[str, Line], tail: bool = False
) -> Line:
    """A line through what fetching took of those steps that do it by this stage; what counts is how far off the steps are."""
    mine = [whole for whole in wholes if whole.gathered == name]
    return through(
        [whole.fetched(lines, tail) for whole in mine], [whole.tail if tail else whole.seconds for whole in mine]
    )


def _has_room(shape: ModelShape, tokens: int) -> bool:
    """Whether the device holds the keys and values of so many tokens some eight times over."""
    return torch.cuda.mem_get_info()[0] > 8 * tokens * shape.token_bytes


class _Whole:
    """A whole step: the stages that it consists of, with their tokens, and what it took."""

    def __init__(
        self, name: str, context: int, cap: int, stages: dict[str, float], gathered: str, times: list[float]
    ) -> None:
        self.name, self.context, self.cap, self.stages, self.gathered = name, context, cap, stages, gathered
        self.seconds, self.tail = statistics.median(times), sorted(times)[math.ceil(0.95 * len(times)) - 1]

    def _others(self, lines: Mapping[str, Line]) -> float:
        return sum(lines[name](tokens) for name, tokens in self.stages.items() if name != self.gathered)

    def fetched(self, lines: Mapping[str, Line], tail: bool = False) -> tuple[float, float]:
        """Tokens fetched and what that took."""
        took = (self.tail if tail else self.seconds) - self._others(lines)
        return self.stages[self.gathered], max(_LEAST, took)

    def report(self, lines: Mapping[str, Line], gathers: Gathers) -> dict[str, Any]:
        """Predicted and measured."""
        others, tokens = self._others(lines), self.stages[self.gathered]
        own, tail = (sum(gathers(self.gathered, tokens, self.context, rare)) for rare in (False, True))
        return {
            "plan": self.name, "context": self.context, "cap": self.cap, "predicted": others + own, "measured": self.seconds,
            "predicted_tail": others + tail, "tail": self.tail,
        }  # fmt: skip


def _measure_stages(
    points: dict[str, list[tuple[float, float]]], cases: list[DeviceCase], tokens: int, cap: int,
    timed: Callable[..., list[float]],
) -> None:  # fmt: skip
    """Time those stages of a step that are not known yet at this length."""
    bits, ratio = cases[0].bits, cases[0].ratio
    passed, cut = f"pass{bits[0]}{bits[1]}", _cut(cap, ratio)
    for case in cases:
        case.step()
    for case in cases:  # a step leaves its buffers ready for the next one: what the stages read has to be there again
        stages = case.stages()
        stages["window"]()
        stages["pass"]()

    def took(stage: str) -> float:
        return statistics.median(timed([case.stages()[stage] for case in cases], _STAGE_REPEATS))

    def note(name: str, at: float, stage: str) -> None:
        points.setdefault(name, []).append((at, took(stage)))

    def known(name: str) -> bool:
        return any(at == tokens for at, _ in points.get(name, []))

    if not known(passed) and ratio == 1:
        note("window", INIT + LOCAL, "window")
        note(passed, tokens, "pass")
        note("merge", 1, "merge")
    if bits == (4, 2) and ratio < 1 and not known("scores"):
        ranged = next(seconds for at, seconds in points[passed] if at == tokens)
        points.setdefault("scores", []).append((tokens, max(_LEAST, took("pass") - ranged)))
    if not known(cut):
        note(cut, tokens, "cut")
    for case in cases:
        for stage in ("cut", "gather", "merge"):
            case.stages()[stage]()
        case.work.best.fill_(-math.inf)


def _measure_whole(
    cases: list[DeviceCase], gathered: str, tokens: int, cap: int, timed: Callable[..., list[float]]
) -> _Whole:
    """Time whole steps."""
    bits, ratio = cases[0].bits, cases[0].ratio
    for case in cases:
        case.step()
    parts = {"window": 0.0, "merge": 0.0, f"pass{bits[0]}{bits[1]}": tokens, _cut(cap, ratio): tokens}
    parts[gathered] = cases[0].fetched
    if ratio < 1:
        parts["scores"] = tokens
    name = f"{bits[0]}-bit keys, {bits[1]}-bit values, {f'share {ratio:g}' if ratio < 1 else 'range'}, cap {cap}"
    name += ", 8-bit store" if gathered == "gather8" else ""
    return _Whole(name, tokens, cap, parts, gathered, timed([case.step for case in cases], _REPEATS))


def _cut(cap: int, ratio: float) -> str:
    """The stage that selects."""
    return f"{'share' if ratio < 1 else 'cut'}{cap}"
