"""The cheapest plans, layer by layer, that keep what was promised."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from alaya_hf.planner.layer_plan import Estimate, LayerPlan

Choice = tuple[LayerPlan, Estimate]
_EPS = 1e-12
#: Starts that are priced, see :func:`_priced`, and taken on.
_PRICED = 6


@dataclass(frozen=True)
class Limits:
    """What the plans of all layers together have to keep.

    Attributes
    ----------
    device_bytes : int or None
        Never exceeded.
    seconds : float or None
        Of the attention of all layers; None: as little as possible.
    kl : float
    firm : bool
        Whether `kl` was asked for; otherwise it gives way to `seconds`.
    """

    device_bytes: int | None
    seconds: float | None
    kl: float
    firm: bool


class _Table:
    """The options of all layers side by side, a row per layer; places that a layer does not have cost infinitely much.

    Parameters
    ----------
    options : sequence of sequence of (LayerPlan, Estimate)
    key, shared : callable
        See :func:`search`.
    """

    def __init__(
        self, options: Sequence[Sequence[Choice]], key: Callable[[LayerPlan], Hashable], shared: Callable[[LayerPlan], int]
    ) -> None:  # fmt: skip
        self.options = options
        rows, columns = len(options), max(map(len, options))
        self.bytes, self.seconds, self.kl = (np.full((rows, columns), np.inf) for _ in range(3))
        self.keys = np.zeros((rows, columns), dtype=np.int64)
        names: dict[Hashable, int] = {}
        sizes: list[int] = []
        for i, layer in enumerate(options):
            for p, (plan, e) in enumerate(layer):
                self.bytes[i, p], self.seconds[i, p], self.kl[i, p] = e.device_bytes, e.seconds, e.kl
                name = key(plan)
                if name not in names:
                    names[name] = len(names)
                    sizes.append(shared(plan))
                self.keys[i, p] = names[name]
        self.sizes, self.rows = np.array(sizes, dtype=float), np.arange(rows)

    def totals(self, picked: NDArray[np.int64]) -> tuple[float, float, float]:
        """Bytes, seconds and KL of a choice; buffers that layers share count once."""
        used = np.unique(self.keys[self.rows, picked])
        size = self.bytes[self.rows, picked].sum() + self.sizes[used].sum()
        return float(size), float(self.seconds[self.rows, picked].sum()), float(self.kl[self.rows, picked].sum())


class _State:
    """A choice for every layer and its totals."""

    def __init__(self, table: _Table, picked: NDArray[np.int64]) -> None:
        self.table, self.picked = table, picked.copy()
        self.used = np.bincount(table.keys[table.rows, picked], minlength=len(table.sizes))
        self.bytes, self.seconds, self.kl = table.totals(picked)

    def deltas(self) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """What moving a layer (row) to another plan (column) adds: bytes, seconds, KL."""
        t, at = self.table, (self.table.rows, self.picked)
        old = t.keys[at]
        new_size = np.where(self.used[t.keys] == 0, t.sizes[t.keys], 0.0)
        old_size = np.where(self.used[old] == 1, t.sizes[old], 0.0)
        shared = np.where(t.keys == old[:, None], 0.0, new_size - old_size[:, None])
        return t.bytes - t.bytes[at][:, None] + shared, t.seconds - t.seconds[at][:, None], t.kl - t.kl[at][:, None]

    def move(self, layer: int, to: int) -> None:
        t = self.table
        self.used[t.keys[layer, self.picked[layer]]] -= 1
        self.used[t.keys[layer, to]] += 1
        self.picked[layer] = to
        self.bytes, self.seconds, self.kl = t.totals(self.picked)


def search(
    options: Sequence[Sequence[Choice]],
    limits: Limits,
    key: Callable[[LayerPlan], Hashable],
    shared: Callable[[LayerPlan], int],
) -> list[Choice] | None:
    """Choose one option per layer.

    Parameters
    ----------
    options : sequence of sequence of (LayerPlan, Estimate)
        Per layer, at least one.
    limits : Limits
    key : callable
        Plans with equal keys share buffers.
    shared : callable
        Bytes of these buffers.

    Returns
    -------
    list of (LayerPlan, Estimate) or None
        None: nothing fits into the memory. Otherwise within the memory; then within `kl` and `seconds` as far as the search
        finds a way; then, with a limit of time, of few bytes, and without one, fast.

    Notes
    -----
    A choice with limits on sums is a knapsack problem with several constraints. Greedy descents, each move the one that gains
    most per byte, from the smallest plans, from each plan that all layers can share, and from what is best layer by layer when
    bytes and KL have prices (Lagrangian relaxation); the best of what these end in. A start beyond the memory is first brought
    into it.
    """
    table = _Table([_pareto(layer) for layer in options], key, shared)
    best: tuple[tuple[float, ...], _State] | None = None
    for start in _starts(table, limits):
        state = _State(table, start)
        _fit(state, limits)
        if limits.device_bytes is not None and state.bytes > limits.device_bytes:
            continue
        _descend(state, limits)
        rank = _rank(state.bytes, state.seconds, state.kl, limits)
        if best is None or rank < best[0]:
            best = rank, state
    return None if best is None else [table.options[i][p] for i, p in enumerate(best[1].picked)]


def _starts(table: _Table, limits: Limits) -> Iterator[NDArray[np.int64]]:
    """Choices to go on from, each once."""
    smallest = np.array([min(enumerate(layer), key=_size)[0] for layer in table.options])
    found = [smallest]
    places = [{plan: p for p, (plan, _) in reversed(list(enumerate(layer)))} for layer in table.options]
    for plan, _ in table.options[0]:
        # Where a layer has no such plan, its own smallest.
        found.append(np.array([at.get(plan, int(own)) for at, own in zip(places, smallest, strict=True)]))
    found += _priced(table, limits)
    seen: set[bytes] = set()
    for start in found:
        if start.tobytes() not in seen:
            seen.add(start.tobytes())
            yield start


def _size(option: tuple[int, Choice]) -> tuple[float, ...]:
    """What an option of a layer, with its place, is small by."""
    _, (_, e) = option
    return e.device_bytes, e.kl, e.seconds


def _priced(table: _Table, limits: Limits) -> list[NDArray[np.int64]]:
    """What is cheapest in every layer at prices of a byte and of a nat: the best within the memory, and what is least beyond."""

    def spread(values: NDArray[np.float64]) -> float:
        finite = np.where(np.isfinite(values), values, np.nan)
        return float(np.nanmedian(np.nanmax(finite, axis=1) - np.nanmin(finite, axis=1))) or 1.0

    seconds = spread(table.seconds)
    by_bytes = [0.0, *(seconds / spread(table.bytes) * 10.0**x for x in np.arange(-2, 2.1, 0.5))]
    by_kl = [0.0, *(seconds / spread(table.kl) * 10.0**x for x in np.arange(-2, 4.1, 0.5))]
    valid = np.isfinite(table.seconds)
    size, kl = (np.where(valid, x, 0.0) for x in (table.bytes, table.kl))
    ranked = []
    for byte, nat in itertools.product(by_bytes, by_kl):
        picked = np.argmin(table.seconds + byte * size + nat * kl, axis=1)
        totals = table.totals(picked)
        over = 0.0 if limits.device_bytes is None else max(0.0, totals[0] / max(1, limits.device_bytes) - 1)
        rank = _rank(*totals, limits)
        ranked.append(((over, *rank), over + rank[0] / limits.kl if limits.kl else over, picked))
    inside = sorted(ranked, key=lambda item: item[0])
    near = sorted(ranked, key=lambda item: (item[1], item[0]))
    return [picked for _, _, picked in (*inside[:_PRICED], *near[:_PRICED])]


def _pareto(layer: Sequence[Choice]) -> list[Choice]:
    """Options that no other one beats in bytes, seconds and KL together; of equals the first."""
    kept: list[Choice] = []
    for plan, e in sorted(layer, key=lambda c: (c[1].device_bytes, c[1].seconds, c[1].kl)):
        if not any(o.device_bytes <= e.device_bytes and o.seconds <= e.seconds and o.kl <= e.kl for _, o in kept):
            kept.append((plan, e))
    return kept


def _rank(size: float, seconds: float, kl: float, limits: Limits) -> tuple[float, ...]:
    over_kl = max(0.0, kl - limits.kl * (1 + 1e-9))
    over_time = 0.0 if limits.seconds is None else max(0.0, seconds - limits.seconds)
    first, second = (over_kl, over_time) if limits.firm else (over_time, over_kl)
    cost = seconds if limits.seconds is None else size
    return first, second, cost, seconds, kl


def _improve(
    state: _State, wanted: Callable[[], bool], gain: int, kl: float | None = None, seconds: float | None = None,
    room: float | None = None,
) -> None:  # fmt: skip
    """Move layers while that is wanted and brings something: the move that gains most per byte.

    Parameters
    ----------
    gain : {0, 1, 2}
        What is to become less: bytes, seconds, KL.
    kl, seconds, room : float, optional
        What KL, seconds and bytes must not exceed then.
    """
    while wanted():
        change = state.deltas()
        gained = -change[gain]
        allowed = gained > _EPS
        if kl is not None:
            allowed &= state.kl + change[2] <= kl
        if seconds is not None:
            allowed &= state.seconds + change[1] <= seconds
        if room is not None:
            allowed &= state.bytes + change[0] <= room
        if not allowed.any():
            return
        # Bytes are what runs out; between plans of equal size, the larger gain.
        value = np.where(allowed, gained / np.maximum(1.0, np.where(allowed, change[0], 1.0)), -np.inf)
        layer, to = np.unravel_index(int(value.argmax()), value.shape)
        state.move(int(layer), int(to))


def _fit(state: _State, limits: Limits) -> None:
    """Bring a choice into the memory, at the least loss of time, of KL only where nothing else does."""
    if limits.device_bytes is None:
        return
    for kl in (max(limits.kl, state.kl), np.inf):
        while state.bytes > limits.device_bytes:
            size, seconds, nats = state.deltas()
            allowed = (size < 0) & (state.kl + nats <= kl)
            if not allowed.any():
                break
            loss = np.where(allowed, np.maximum(seconds, 0.0) + _EPS, 1.0)
            value = np.where(allowed, -size / loss, -np.inf)
            layer, to = np.unravel_index(int(value.argmax()), value.shape)
            state.move(int(layer), int(to))


def _descend(state: _State, limits: Limits) -> None:
    room = None if limits.device_bytes is None else float(limits.device_bytes)

    def slow() -> bool:
        return limits.seconds is None or state.seconds > limits.seconds

    _improve(state, lambda: state.kl > limits.kl, 2, room=room)
    _improve(state, slow, 1, kl=max(limits.kl, state.kl), room=room)
    if limits.seconds is not None and not limits.firm:
        _improve(state, slow, 1, room=room)
    if limits.seconds is None or slow():
        return
    # Within both limits: give back bytes, as long as they stay.
    _improve(state, lambda: True, 0, kl=limits.kl, seconds=limits.seconds, room=room)
