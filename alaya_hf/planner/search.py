"""The cheapest plans, layer by layer, that keep what was promised."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

from alaya_hf.planner.layer_plan import Estimate, LayerPlan

Choice = tuple[LayerPlan, Estimate]
_EPS = 1e-12


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


class _State:
    """A choice for every layer and its totals; buffers that layers share count once."""

    def __init__(
        self, options: Sequence[Sequence[Choice]], keys: Sequence[Sequence[Hashable]], sizes: Mapping[Hashable, int],
        picked: Sequence[int],
    ) -> None:  # fmt: skip
        self.options, self.keys, self.sizes = options, keys, sizes
        kinds: dict[tuple[Choice, ...], int] = {}
        self.kinds = [kinds.setdefault(tuple(layer), len(kinds)) for layer in options]
        self.picked = list(picked)
        self.used = Counter(keys[i][p] for i, p in enumerate(self.picked))
        chosen = [options[i][p][1] for i, p in enumerate(self.picked)]
        self.bytes = sum(e.device_bytes for e in chosen) + sum(sizes[k] for k in self.used)
        self.seconds = sum(e.seconds for e in chosen)
        self.kl = sum(e.kl for e in chosen)

    def delta(self, layer: int, to: int) -> tuple[int, float, float]:
        """What moving a layer to another plan adds: bytes, seconds, KL."""
        at = self.picked[layer]
        old, new = self.options[layer][at][1], self.options[layer][to][1]
        size = new.device_bytes - old.device_bytes
        old_key, key = self.keys[layer][at], self.keys[layer][to]
        if key != old_key:
            size += (0 if self.used[key] else self.sizes[key]) - (self.sizes[old_key] if self.used[old_key] == 1 else 0)
        return size, new.seconds - old.seconds, new.kl - old.kl

    def move(self, layer: int, to: int) -> None:
        size, seconds, kl = self.delta(layer, to)
        self.used[self.keys[layer][self.picked[layer]]] -= 1
        self.used[self.keys[layer][to]] += 1
        self.used += Counter()
        self.picked[layer] = to
        self.bytes, self.seconds, self.kl = self.bytes + size, self.seconds + seconds, self.kl + kl


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
    Greedy, from the smallest plans and from each plan that all layers can share; the best of what these end in. Every move is the
    one that gains most per byte.
    """
    pruned = [_pareto(layer) for layer in options]
    starts = [
        [
            min(range(len(layer)), key=lambda p: (layer[p][1].device_bytes, layer[p][1].kl, layer[p][1].seconds))
            for layer in pruned
        ]
    ]
    for first, _ in pruned[0]:
        same = [next((i for i, (plan, _) in enumerate(layer) if plan == first), None) for layer in pruned]
        # Where a layer has no such plan, its own best.
        starts.append([starts[0][i] if p is None else p for i, p in enumerate(same)])
    keys = [[key(plan) for plan, _ in layer] for layer in pruned]
    sizes: dict[Hashable, int] = {}
    for layer, own in zip(pruned, keys, strict=True):
        for (plan, _), k in zip(layer, own, strict=True):
            if k not in sizes:
                sizes[k] = shared(plan)
    best: tuple[tuple[float, ...], list[Choice]] | None = None
    for start in starts:
        state = _State(pruned, keys, sizes, start)
        if limits.device_bytes is not None and state.bytes > limits.device_bytes:
            continue
        _descend(state, limits)
        rank = _rank(state, limits)
        if best is None or rank < best[0]:
            best = rank, [pruned[i][p] for i, p in enumerate(state.picked)]
    return None if best is None else best[1]


def _pareto(layer: Sequence[Choice]) -> list[Choice]:
    """Options that no other one beats in bytes, seconds and KL together; of equals the first."""
    kept: list[Choice] = []
    for plan, e in sorted(layer, key=lambda c: (c[1].device_bytes, c[1].seconds, c[1].kl)):
        if not any(o.device_bytes <= e.device_bytes and o.seconds <= e.seconds and o.kl <= e.kl for _, o in kept):
            kept.append((plan, e))
    return kept


def _rank(state: _State, limits: Limits) -> tuple[float, ...]:
    over_kl = max(0.0, state.kl - limits.kl * (1 + 1e-9))
    over_time = 0.0 if limits.seconds is None else max(0.0, state.seconds - limits.seconds)
    first, second = (over_kl, over_time) if limits.firm else (over_time, over_kl)
    cost = state.seconds if limits.seconds is None else state.bytes
    return first, second, cost, state.seconds, state.kl


def _descend(state: _State, limits: Limits) -> None:
    def improve(wanted: Callable[[], bool], gain: int, allowed: Callable[[tuple[int, float, float]], bool]) -> None:
        while wanted():
            best: tuple[float, int, int] | None = None
            seen: set[tuple[int, int]] = set()
            for i, layer in enumerate(state.options):
                # Layers with the same options and the same choice would only say the same again.
                if (state.kinds[i], state.picked[i]) in seen:
                    continue
                seen.add((state.kinds[i], state.picked[i]))
                for p in range(len(layer)):
                    if p == state.picked[i]:
                        continue
                    change = state.delta(i, p)
                    gained = -change[gain]
                    if gained <= _EPS or not allowed(change):
                        continue
                    if limits.device_bytes is not None and state.bytes + change[0] > limits.device_bytes:
                        continue
                    # Bytes are what runs out; between plans of equal size, the larger gain.
                    value = gained / max(1.0, float(change[0]))
                    if best is None or value > best[0]:
                        best = value, i, p
            if best is None:
                return
            state.move(best[1], best[2])

    def slow() -> bool:
        return limits.seconds is None or state.seconds > limits.seconds

    improve(lambda: state.kl > limits.kl, 2, lambda c: True)
    improve(slow, 1, lambda c: state.kl + c[2] <= max(limits.kl, state.kl))
    if limits.seconds is not None and not limits.firm:
        improve(slow, 1, lambda c: True)
    if limits.seconds is None or slow():
        return
    # Within both limits: give back bytes, as long as they stay.
    improve(lambda: True, 0, lambda c: state.kl + c[2] <= limits.kl and state.seconds + c[1] <= limits.seconds)  # type: ignore[operator]
