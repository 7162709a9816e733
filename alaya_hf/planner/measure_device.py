"""What the stages of the device engine cost here: kernels over one row of one layer, each replayed as a CUDA graph."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from alaya_hf.kernels.gpu import cut, gather, lowbit, merge, quantise, window
from alaya_hf.kernels.gpu.host_memory import device_view
from alaya_hf.kernels.gpu.layout import TILE, Layout
from alaya_hf.kernels.gpu.step import Workspace, decode_step
from alaya_hf.kernels.gpu.store_format import EIGHT_BIT, StoreFormat
from alaya_hf.planner.calibration import Line
from alaya_hf.planner.layer_plan import LayerPlan
from alaya_hf.planner.measure_host import fit, sample_layer
from alaya_hf.planner.shape import ModelShape
from alaya_hf.storage.pinned import pinned_pool

#: Tokens at which stages are timed.
LENGTHS = (16384, 131072)
_INIT, _LOCAL = 128, 512
_RING = _LOCAL + TILE
_CAPS = (32, 256)
_BITS = ((4, 4), (4, 0), (8, 2), (4, 2))


def graph_seconds(calls: Sequence[Callable[[], Any]], repeats: int = 11) -> float:
    """Median seconds of one of several calls that a CUDA graph runs one after the other.

    Parameters
    ----------
    calls : sequence of callable
        Over different memory, so that the cache of the device does not hold what the next one reads.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(repeats + 2):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1e3 / len(calls))
    return statistics.median(times[2:])


class _Case:
    """A layer on the device at one length: what every stage reads."""

    def __init__(self, shape: ModelShape, tokens: int, bits: tuple[int, int], cap: int, store: Tensor, form: StoreFormat,
                 keys: Tensor, values: Tensor, q: Tensor) -> None:  # fmt: skip
        device = keys.device
        self.bits, self.store, self.q = bits, store, q
        self.scaling = shape.head_dim**-0.5
        self.low_tokens = (tokens - _INIT - _LOCAL) // TILE * TILE
        layout = Layout(shape.head_dim, *bits)
        self.records = layout.allocate(1, shape.kv_heads, self.low_tokens + 4 * TILE, device)
        zero = torch.zeros(1, dtype=torch.int32, device=device)
        span = slice(_INIT, _INIT + self.low_tokens)
        quantise.quantise_tokens(
            keys[:, :, span], values[:, :, span], self.records, zero, zero + self.low_tokens, *bits
        )
        self.window_k = keys[:, :, : _INIT + _RING].clone()
        self.window_v = values[:, :, : _INIT + _RING].clone()
        self.k, self.v = keys[:, :, 0].clone(), values[:, :, 0].clone()
        self.total = torch.tensor([_INIT + self.low_tokens + _LOCAL], dtype=torch.int32, device=device)
        self.low = torch.tensor([self.low_tokens], dtype=torch.int32, device=device)
        self.work = Workspace(
            1,
            shape.kv_heads,
            shape.group,
            layout,
            self.records.shape[2] * TILE,
            _INIT + _RING,
            cap,
            device,
            shape.dtype,
        )
        self.beta, self.ratio = 5.8 / self.scaling, 1.0  # alpha 0.003

    def step(self) -> Tensor:
        """A whole step."""
        return decode_step(
            self.work, self.q, self.k, self.v, self.window_k, self.window_v, self.store, self.records, self.total, self.low,
            _INIT, _LOCAL, self.scaling, self.beta, self.ratio,
        )  # fmt: skip

    def stages(self) -> dict[str, Callable[[], Any]]:
        """The parts of a step, each on what the ones before it left in the buffers."""
        work, bits, scaling = self.work, self.bits, self.scaling
        after = work.window_parts + work.parts
        scratch = torch.empty_like(work.best)  # the merge would reset what the other stages read

        def at_window() -> None:
            window.window_attention(self.q, self.k, self.v, self.window_k, self.window_v, self.store, self.total, self.low,
                                    work.best, work.acc, work.ml, 0, _INIT, scaling)  # fmt: skip
            quantise.extend_lowbit(
                self.window_k, self.window_v, self.records, self.total, self.low, _INIT, _LOCAL, *bits
            )

        def scan() -> None:
            lowbit.lowbit_pass(self.records, self.q, self.low, work.best, work.tile_max, work.scores, work.acc, work.ml,
                               work.window_parts, work.parts, scaling, self.beta, *bits)  # fmt: skip

        def select() -> None:
            cut.cut(work.tile_max, work.scores, work.best, work.ml, self.low, work.ids, work.counts, work.thresholds,
                    work.limits, work.chosen, work.window_parts, work.parts, scaling, self.beta, 1.0)  # fmt: skip

        def attend() -> None:
            gather.gather_attention(self.store, self.q, work.ids, work.counts, work.thresholds, work.limits, work.scores,
                                    self.records, work.acc, work.ml, work.fetched, after, scaling, *bits, True, True)  # fmt: skip

        def together() -> None:
            merge.merge_partials(work.acc, work.ml, work.out, work.lse, scratch)

        return {"window": at_window, "pass": scan, "cut": select, "gather": attend, "merge": together}


def measure_device(
    shape: ModelShape, lengths: tuple[int, int] = LENGTHS, turns: int = 3
) -> tuple[dict[str, Line], list[dict[str, Any]]]:
    """Costs of the device engine's stages, see :data:`~alaya_hf.planner.calibration.DEVICE_STAGES`.

    Parameters
    ----------
    shape : ModelShape
        On ``cuda``, in a half precision.
    lengths : (int, int)
        Tokens.
    turns : int
        Copies of the layer that take turns.

    Returns
    -------
    stages : dict of str to Line
    report : list of dict
        Whole steps of one layer: ``plan``, ``context``, ``predicted`` (the sum of the stages) and ``measured``, seconds.

    Notes
    -----
    Some ten seconds with the default lengths, and as long as it takes to compile the kernels where they are new.
    """
    device = torch.device("cuda")
    points: dict[str, list[tuple[float, float]]] = {}
    wholes: list[tuple[str, int, float, float, tuple[int, int], bool]] = []
    row, q = sample_layer(shape, max(lengths))
    whole_keys, whole_values = (row[None, :, :, side].contiguous().to(device) for side in (0, 1))
    query = q.reshape(1, -1, shape.head_dim).to(device, shape.dtype)
    gathered: dict[str, list[tuple[float, float]]] = {"gather": [], "gather8": []}
    for tokens in lengths:
        keys, values = whole_keys[:, :, :tokens], whole_values[:, :, :tokens]
        attend = torch.nn.functional.scaled_dot_product_attention
        dense = [
            partial(attend, query.unsqueeze(2), keys.clone(), values.clone(), enable_gqa=True) for _ in range(turns)
        ]
        points.setdefault("dense", []).append((tokens, graph_seconds(dense)))
        del dense
        for name, dtype in (("gather", shape.dtype), ("gather8", torch.int8)):
            form = StoreFormat(shape.head_dim, dtype)
            store = _store(form, keys, values)
            for bits in _BITS if name == "gather" else ((4, 2),):
                for cap in _CAPS if bits == (4, 2) else (_CAPS[0],):
                    cases = [_Case(shape, tokens, bits, cap, store, form, keys, values, query) for _ in range(turns)]
                    for case in cases:
                        case.step()
                    fetched = float(cases[0].work.fetched.sum(-1).float().mean())
                    times = {
                        stage: graph_seconds([case.stages()[stage] for case in cases])
                        for stage in ("window", "pass", "cut", "gather", "merge")
                    }
                    gathered[name].append((fetched, times["gather"]))
                    if name == "gather":
                        key = f"pass{bits[0]}{bits[1]}"
                        if cap == _CAPS[0]:
                            points.setdefault(key, []).append((tokens, times["pass"]))
                            if bits == (4, 2):
                                points.setdefault("cut", []).append((tokens, times["cut"]))
                                points.setdefault("window", []).append((_INIT + _LOCAL, times["window"]))
                                points.setdefault("merge", []).append((1, times["merge"]))
                    measured = graph_seconds([case.step for case in cases])
                    wholes.append(
                        (
                            f"{bits[0]}-bit keys, {bits[1]}-bit values, cap {cap}",
                            tokens,
                            fetched,
                            measured,
                            bits,
                            name == "gather8",
                        )
                    )
                    del cases
    lines = {name: fit(found) for name, found in points.items() if name not in ("window", "merge")}
    lines["window"] = Line(statistics.median(s for _, s in points["window"]), 0.0)
    lines["merge"] = Line(statistics.median(s for _, s in points["merge"]), 0.0)
    for name, found in gathered.items():
        found.sort()
        few, many = found[: len(found) // 2], found[len(found) // 2 :]
        ends = [(statistics.mean(x for x, _ in part), statistics.median(y for _, y in part)) for part in (few, many)]
        lines[name] = fit(ends) if ends[1][0] > ends[0][0] else Line(ends[1][1], 0.0)
    # Stages overlap, and a graph saves launches between them: what whole steps differ by goes into the fixed part.
    gaps = [
        measured - _sum(lines, tokens, fetched, bits, eight) for _, tokens, fetched, measured, bits, eight in wholes
    ]
    shift = statistics.median(gaps)
    lines["merge"] = Line(max(0.0, lines["merge"].fixed + shift), 0.0)
    report = [
        {"plan": name, "context": tokens, "predicted": _sum(lines, tokens, fetched, bits, eight), "measured": measured}
        for name, tokens, fetched, measured, bits, eight in wholes
    ]
    return lines, report


def _sum(lines: dict[str, Line], tokens: int, fetched: float, bits: tuple[int, int], eight: bool) -> float:
    parts = [
        lines["window"](0),
        lines["merge"](0),
        lines["cut"](tokens),
        lines["gather8" if eight else "gather"](fetched),
    ]
    return sum(parts) + lines[f"pass{bits[0]}{bits[1]}"](tokens)


def plan_seconds(plan: LayerPlan, shape: ModelShape, tokens: int, turns: int = 3) -> float:
    """Seconds of one layer's decode step under a plan of the device engine, replayed as a CUDA graph.

    Parameters
    ----------
    plan : LayerPlan
    shape : ModelShape
    tokens : int
        Context.
    """
    from alaya_hf.config import AlayaConfig
    from alaya_hf.engine.device.plan import device_plan

    asked = device_plan(AlayaConfig(**plan.settings()), 0)
    keys, values, query = _on_device(shape, tokens)
    form = StoreFormat(shape.head_dim, EIGHT_BIT.get(plan.store_dtype, shape.dtype))
    store, bits = _store(form, keys, values), (asked.key_bits, asked.value_bits)
    cases = [_Case(shape, tokens, bits, asked.cap, store, form, keys, values, query) for _ in range(turns)]
    for case in cases:
        case.beta, case.ratio = asked.beta(case.scaling), asked.ratio
    return graph_seconds([case.step for case in cases])


@lru_cache(maxsize=1)
def _on_device(shape: ModelShape, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values and queries of :func:`sample_layer` on the device."""
    row, q = sample_layer(shape, tokens)
    keys, values = (row[None, :, :, side].contiguous().to("cuda") for side in (0, 1))
    return keys, values, q.reshape(1, -1, shape.head_dim).to("cuda", shape.dtype)


def _store(form: StoreFormat, keys: Tensor, values: Tensor) -> Tensor:
    """The tokens behind the first ones in pinned host memory, with room for a step's new one, as the device sees it."""
    kv_heads, places = keys.shape[1], keys.shape[2] - _INIT
    pinned = pinned_pool().allocate((1, kv_heads, places + TILE, *form.tail), form.dtype)
    pinned[0, :, :places].copy_(form.pack(keys[0, :, _INIT:], values[0, :, _INIT:]))
    return device_view(pinned, keys.device)
