"""What the stages of the host engine cost here: kernels over one row of one layer, at two lengths."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from alaya_hf.kernels import host
from alaya_hf.kernels.attention import window_attention
from alaya_hf.kernels.cpu.blocks import BlockMeans
from alaya_hf.kernels.cpu.lowbit import LowBitKV
from alaya_hf.planner.calibration import Line
from alaya_hf.planner.shape import ModelShape
from alaya_hf.query import DIPR, Recovery

#: Tokens at which stages are timed. The longer one leaves the processor's caches behind.
LENGTHS = (4096, 32768)
_FETCHED = (32, 512)


def sample_layer(
    shape: ModelShape, tokens: int, seed: int = 0, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Keys and values of one row, and queries, whose scores spread as a model's do.

    Parameters
    ----------
    shape : ModelShape
    tokens, seed : int
    device : torch.device or str
        Where to make them; another device, other numbers.

    Returns
    -------
    kv : Tensor
        ``[kv_heads, tokens, 2, head_dim]`` in the model's dtype.
    q : Tensor
        ``[kv_heads, group, head_dim]`` float32.

    Notes
    -----
    Keys share a mean and vary along a few directions; one key in 64 points along the queries, so that a range finds some dozens
    of tokens and tiles of values are skipped as they are on text.
    """
    with torch.device(device):
        generator = torch.Generator(device).manual_seed(seed)
        d = shape.head_dim
        q = torch.randn(shape.kv_heads, shape.group, d, generator=generator)
        kv = torch.empty(shape.kv_heads, tokens, 2, d, dtype=shape.dtype)
        for head in range(shape.kv_heads):
            basis = torch.randn(8, d, generator=generator)
            keys = torch.randn(tokens, 8, generator=generator) @ basis * 0.4 + torch.randn(d, generator=generator)
            chosen = torch.rand(tokens, generator=generator) < 1 / 64
            which = torch.randint(shape.group, (tokens,), generator=generator)
            along = torch.rand(tokens, 1, generator=generator) * 1.2
            keys = keys + torch.where(chosen[:, None], along * q[head, which], torch.zeros(()))
            kv[head, :, 0] = keys.to(shape.dtype)
            kv[head, :, 1] = torch.randn(tokens, d, generator=generator).to(shape.dtype)
    return kv, q


def times(call: Callable[[], Any], repeats: int = 7, cold: bool = True) -> list[float]:
    """Wall times of a call, after one that does not count; if `cold`, each with caches that hold other data.

    Notes
    -----
    Between two steps of a layer a model reads its weights and all other layers: a layer that is called again and again would be
    found in the processor's caches, and the small low-bit copies before the large vectors, which favours sparse steps.
    """
    call()
    other = _other_data()
    found = []
    for _ in range(repeats):
        if cold:
            other.sum()
        began = time.perf_counter()
        call()
        found.append(time.perf_counter() - began)
    return found


@lru_cache(maxsize=1)
def _other_data() -> Tensor:
    """More than a processor's caches hold."""
    return torch.zeros(32 << 20)


def seconds(call: Callable[[], Any], repeats: int = 7, cold: bool = True) -> float:
    """Median of :func:`times`."""
    return statistics.median(times(call, repeats, cold))


def fit(points: Sequence[tuple[float, float]], sizes: Sequence[float] | None = None) -> Line:
    """The straight line, with neither cost negative, whose relative errors at the points have the least squares.

    Parameters
    ----------
    points : sequence of (float, float)
        Tokens and seconds, at least one; through two it goes exactly where it may.
    sizes : sequence of float, optional
        Seconds that the errors at the points are relative to; default: the points' own.
    """
    weights = _weights(points, sizes)
    total = sum(weights)
    x0 = sum(w * x for w, (x, _) in zip(weights, points, strict=True)) / total
    y0 = sum(w * y for w, (_, y) in zip(weights, points, strict=True)) / total
    spread = sum(w * (x - x0) ** 2 for w, (x, _) in zip(weights, points, strict=True))
    slope = 0.0
    if spread > 0:
        slope = max(0.0, sum(w * (x - x0) * (y - y0) for w, (x, y) in zip(weights, points, strict=True)) / spread)
    fixed = y0 - slope * x0
    if fixed >= 0:
        return Line(fixed, slope)
    steep = sum(w * x * y for w, (x, y) in zip(weights, points, strict=True))
    return Line(0.0, steep / sum(w * x * x for w, (x, _) in zip(weights, points, strict=True)))


def _weights(points: Sequence[tuple[float, float]], sizes: Sequence[float] | None) -> list[float]:
    return [1 / max(size, 1e-12) ** 2 for size in ([y for _, y in points] if sizes is None else sizes)]


def fit_bent(points: Sequence[tuple[float, float]], sizes: Sequence[float] | None = None) -> Line:
    """:func:`fit`, with a bend upwards where that takes half off the squared relative errors.

    Reading scattered rows over the bus costs more for each row once there are many over much memory.

    Parameters
    ----------
    points : sequence of (float, float)
        Tokens and seconds, at least one. A bend lies at one of them, three or more up to it.
    sizes : sequence of float, optional
        See :func:`fit`.
    """
    weights = _weights(points, sizes)
    triples = [(x, y, w) for (x, y), w in zip(points, weights, strict=True)]

    def error(line: Line) -> float:
        return sum(w * (line(x) - y) ** 2 for x, y, w in triples)

    best = fit(points, sizes)
    limit = error(best) / 2
    for knee in sorted({x for x, _ in points})[:-1]:
        below = [(x, y, w) for x, y, w in triples if x <= knee]
        if len(below) < 3:
            continue
        line = fit([(x, y) for x, y, _ in below], [w**-0.5 for _, _, w in below])
        over = [(x - knee, y - line(x), w) for x, y, w in triples if x > knee]
        beyond = max(0.0, sum(w * x * y for x, y, w in over) / sum(w * x * x for x, _, w in over))
        bent = Line(line.fixed, line.per_token, knee, beyond)
        if beyond and error(bent) < limit:
            best, limit = bent, error(bent)
    return best


def measure_host(shape: ModelShape, lengths: tuple[int, int] = LENGTHS, repeats: int = 7) -> dict[str, Line]:
    """Costs of the host engine's stages, see :data:`~alaya_hf.planner.calibration.HOST_STAGES`.

    Parameters
    ----------
    shape : ModelShape
        Of the layer: heads, head dimension and dtype.
    lengths : (int, int)
        Tokens.
    repeats : int

    Returns
    -------
    dict of str to Line
        Seconds per row. About two seconds with the default lengths, and as long as it takes to compile the kernels where they
        are new.
    """
    points: dict[str, list[tuple[float, float]]] = {}
    scaling = shape.head_dim**-0.5
    kv, q = sample_layer(shape, max(lengths))
    best = torch.full(q.shape[:2], float("-inf"))

    def note(stage: str, tokens: int, call: Callable[[], Any]) -> None:
        # What works on the scores finds them where the scan has just left them.
        cold = stage not in ("cut", "cut_recovery", "select")
        points.setdefault(stage, []).append((tokens, seconds(call, repeats, cold)))

    cut = DIPR(alpha=0.003, cap=128)
    for tokens in lengths:
        part = kv[:, :tokens]
        note("dense", tokens, partial(host.dense_attention, q, part, scaling))
        note("flat", tokens, partial(host.scan_scores, q, part))
        scores = host.scan_scores(q, part)
        note("cut", tokens, partial(cut.threshold, scores, best, scaling, best))
        note("cut_recovery", tokens, partial(Recovery(0.98).threshold, scores, best, scaling, best))
        threshold = cut.threshold(scores, best, scaling, best)
        note("select", tokens, partial(host.select_threshold, scores, threshold))
        for bits, values in ((2, None), (8, None), (4, 4), (4, 2)):
            if shape.head_dim % 16:
                points.setdefault(f"scan{bits}", []).append(points["flat"][-1])
                points.setdefault(f"values{values or 4}", []).append(points["dense"][-1])
                continue
            low = LowBitKV(shape.kv_heads, shape.head_dim, bits, values)
            low.append(part)
            if values != 4:
                note(f"scan{bits}", tokens, partial(host.lowbit_scores, q, low))
            if values:
                left = host.lowbit_scores(q, low)
                note(f"values{values}", tokens, partial(host.lowbit_attention, low, left, scaling, skip=1e-2))
        ids, offsets, mask = host.select_threshold(scores, threshold)
        for name, block, keyed in (("means", 32, False), ("key_means", 16, True)):
            means = BlockMeans(shape.kv_heads, shape.head_dim, block, keyed)
            means.append(part)
            known = None if keyed else scores
            found = {"kv": part, "ids": ids, "offsets": offsets, "mask": mask}
            note(name, tokens, partial(host.block_mean_attention, q, means, scaling, scores=known, **found))
    generator = torch.Generator().manual_seed(1)
    for fetched in _FETCHED:
        count = min(fetched, max(lengths))
        chosen = [
            torch.randperm(max(lengths), generator=generator)[:count].sort().values for _ in range(shape.kv_heads)
        ]
        ids, offsets = torch.cat(chosen).to(torch.int32), torch.arange(shape.kv_heads + 1) * count
        note("gather", count, partial(host.gather_attention, q, kv, ids, offsets, scaling, None))
        # A walk scores keys one by one where they lie, and keeps its lists: about twice the scoring alone.
        scored = seconds(partial(host.gather_scores, q, kv, ids, offsets), repeats)
        points.setdefault("graph", []).append((count, 2 * scored))
    for tokens in (128, 640):
        keys = kv[None, :, :tokens, 0].contiguous()
        query = q.reshape(1, -1, 1, shape.head_dim).to(shape.dtype)
        note("window", tokens, partial(window_attention, query, keys, keys, scaling, None, None))
    return {stage: fit(found) for stage, found in points.items()}


def weights_per_second(shape: ModelShape, device: str = "cpu", repeats: int = 9) -> float:
    """Bytes of weights per second that a product of one row with a large matrix reads."""
    weight = torch.ones(4096, 8192, dtype=shape.dtype, device=device)
    row = torch.ones(1, 8192, dtype=shape.dtype, device=device)

    def product() -> None:
        torch.nn.functional.linear(row, weight)
        if device != "cpu":
            torch.cuda.synchronize()

    return weight.numel() * weight.element_size() / seconds(product, repeats)
