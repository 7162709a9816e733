"""What the study's cells say: bounds that hold or do not, and sentences whose every number is computed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

_RESIDENT = ("resident", "full", "static_compiled")
_OWN = "the engine's own store"


def cells(rows: Sequence[dict[str, Any]], **settings: Any) -> Iterator[dict[str, Any]]:
    """Those with these settings."""
    for row in rows:
        if all(row["settings"].get(name) == value for name, value in settings.items()):
            yield row


def measured(rows: Sequence[dict[str, Any]], **settings: Any) -> Iterator[dict[str, Any]]:
    """Those of them that were run."""
    return (row for row in cells(rows, **settings) if "not run" not in row)


def values(rows: Sequence[dict[str, Any]], name: str) -> list[Any]:
    """What a setting is in some cell, in order of appearance."""
    return list(dict.fromkeys(row["settings"][name] for row in rows if row["settings"].get(name) is not None))


def plausible(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows, without the times of all layers where the line through two numbers of layers falls: that is noise."""
    lines = ("ms per token", "tokens/s")
    return [
        {name: value for name, value in row.items() if name not in lines}
        if row.get("ms per token") is not None and row["ms per token"] < row.get("measured ms", 0)
        else row
        for row in rows
    ]


def wholest(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of measured cells that differ in the layers run alone, the one with the most; all others as they are."""

    def place(row: dict[str, Any]) -> tuple[Any, ...]:
        return tuple((k, v) for k, v in sorted(row["settings"].items()) if k not in ("layers", "weights", "new"))

    most: dict[tuple[Any, ...], int] = {}
    for row in measured(rows):
        most[place(row)] = max(most.get(place(row), 0), row["settings"].get("layers", 0))
    return [row for row in rows if "not run" in row or row["settings"].get("layers", 0) == most[place(row)]]


def _places(rows: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for shape in values(rows, "shape"):
        for context in sorted(values([row for row in rows if row["settings"]["shape"] == shape], "context")):
            yield {"shape": shape, "context": context}


def _least(rows: Iterator[dict[str, Any]], name: str) -> dict[str, Any]:
    return min((row for row in rows if row.get(name) is not None), key=lambda row: row[name], default={})


def _most(rows: Iterator[dict[str, Any]], name: str) -> dict[str, Any]:
    return max((row for row in rows if row.get(name) is not None), key=lambda row: row[name], default={})


def _ratio(one: float | None, other: float | None) -> float | None:
    return None if one is None or not other else one / other


def answers(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A line per bound and context: what was asked for, what was measured, whether it holds.

    Notes
    -----
    A batch counts where all of the shape's layers ran, or the plan for the whole shape has room for it.
    """
    found = []
    for place in _places(rows):
        ours = [
            row
            for row in measured(rows, part="decode", system="alaya", **place)
            if row["settings"]["allocation"] is None
        ]
        theirs = [row for name in _RESIDENT for row in measured(rows, part="decode", system=name, **place)]
        one, resident = (
            _least(iter([row for row in group if row["settings"]["batch"] == 1]), "ms per token")
            for group in (ours, theirs)
        )
        offloaded = _least(measured(rows, part="decode", system="offloaded", batch=1, **place), "ms per token")
        room = next(measured(rows, part="limits", **place), {})
        mine = [row for row in ours if row["settings"]["batch"] <= room.get("alaya rows", 0)]
        # What ran over all layers fitted, whatever was planned; peaks of some layers say nothing.
        whole = _most_layers(rows, place["shape"])
        best = [
            row for row in theirs
            if row["settings"]["batch"] <= room.get("resident rows", 0) or row["settings"]["layers"] == whole
        ]  # fmt: skip
        largest = max((row["settings"]["batch"] for row in mine), default=None)
        their_largest = max((row["settings"]["batch"] for row in best), default=None)
        dense = next(measured(rows, part="prefill", prefill="dense", batch=1, allocation=None, **place), {})
        ours_best, their_best = _most(iter(mine), "tokens/s"), _most(iter(best), "tokens/s")
        lines: list[tuple[str, str, float | None, bool | None]] = []

        def line(what: str, bound: str, value: float | None, low: float, high: float, into: Any = lines) -> None:
            into.append((what, bound, value, None if value is None else low <= value <= high))

        most = float("inf")
        time = one.get("ms per token")
        line("time per token / resident", "<= 1.15", _ratio(time, resident.get("ms per token")), 0, 1.15)
        line("offloaded DynamicCache / time per token", ">= 15", _ratio(offloaded.get("ms per token"), time), 15, most)
        line("largest batch / resident's", ">= 1.8", _ratio(largest, their_largest), 1.8, most)
        line(
            "tokens/s / resident's best",
            ">= 1.5",
            _ratio(ours_best.get("tokens/s"), their_best.get("tokens/s")),
            1.5,
            most,
        )
        share = one.get("device share")
        line("cache on the device, % of the full KV", "<= 24.5", None if share is None else 100 * share, 0, 24.5)
        line("planned / measured peak of a prefill", "0.9 to 1.1", dense.get("planned / measured"), 0.9, 1.1)
        if room.get("resident rows") == 0:
            note = "no row of resident keys fits"
        else:
            note = f"batches {largest or '-'} and {their_largest or '-'}" if room else ""
        decoded = bool(ours or theirs)
        for what, bound, value, holds in lines:
            # A context that only prefill was checked at has no other bounds.
            if value is None and not decoded:
                continue
            found.append({
                "shape": place["shape"], "tokens": f"{place['context']:,}", "what": what, "bound": bound, "measured": value,
                "holds": {True: "yes", False: "no", None: "not measured"}[holds],
                "note": note if "batch" in what or "tokens/s" in what else "",
            })  # fmt: skip
    return found


def _most_layers(rows: Sequence[dict[str, Any]], shape: str) -> int:
    from eval.random_model import SHAPES

    return SHAPES[shape]["num_hidden_layers"]


def _spread(rows: Iterator[dict[str, Any]], name: str) -> tuple[dict[str, Any], dict[str, Any], float] | None:
    """Fastest, slowest, and how much more that is in per cent, of at least two: as measured, of the most layers that two ran."""
    alike: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        if row["settings"]["allocation"] is not None and row.get(name):
            alike.setdefault(row["settings"]["layers"], []).append(row)
    most = max((layers for layers, held in alike.items() if len(held) > 1), default=None)
    if most is None:
        return None
    held = alike[most]
    low, high = min(held, key=lambda row: row[name]), max(held, key=lambda row: row[name])
    return low, high, 100 * (high[name] / low[name] - 1)


def _at(place: dict[str, Any], batch: int) -> str:
    return f"{place['shape']}, {place['context']:,} tokens, batch {batch}"


def in_short(rows: Sequence[dict[str, Any]]) -> str:
    """The answer in a paragraph, for a reader who wants no more; empty without measured decoding through allocators."""
    gaps, slowest, gains = [], [], []
    for place in _places(rows):
        for batch in sorted(values(list(cells(rows, **place)), "batch")):
            decoded = _spread(measured(rows, part="decode", batch=batch, **place), "measured ms")
            gaps += [decoded[2]] if decoded else []
            for prefill in ("dense", "bsfa"):
                filled = _spread(measured(rows, part="prefill", prefill=prefill, batch=batch, **place), "measured s")
                slowest += [(filled[1]["settings"]["allocation"], 1 + filled[2] / 100)] if filled else []
            own = {
                prefill: next(
                    measured(rows, part="prefill", prefill=prefill, batch=batch, allocation=None, **place), {}
                )
                for prefill in ("dense", "bsfa")
            }
            gain = _ratio(own["dense"].get("first token s"), own["bsfa"].get("first token s"))
            gains += [gain] if gain is not None else []
    held: dict[str, list[float]] = {}
    for row in measured(rows, part="allocation"):
        held.setdefault(row["settings"]["allocation"], []).append(row["held / needed"])
    if not gaps or not held:
        return ""
    lean = [name for name, shares in held.items() if max(shares) < 1.05]
    others = [name for name in held if name not in lean]
    text = (
        f"**In short.** Whichever strategy holds the context, a token takes as long, within {max(gaps):.0f} %. "
        "What they decide is memory"
    )
    if lean and others:
        wasted = [share for name in others for share in held[name]]
        text += (
            f": {_listed(lean)} hold what is needed and at most {100 * (max(max(held[name]) for name in lean) - 1):.1f} % more, "
            f"{_listed(others)} {min(wasted):.1f} to {max(wasted):.1f} times as much"
        )
    text += "."
    if slowest:
        names = dict.fromkeys(name for name, ratio in slowest if ratio > 1.25)
        ratios = [ratio for _, ratio in slowest]
        text += f" A prompt takes {min(ratios):.2f} to {max(ratios):.2f} times as long into the slowest pool as into the fastest"
        text += f" (slowest where it is more than 1.25: {_listed(list(names))})." if names else "."
    if gains:
        text += (
            f" BSFA brings the first token {min(gains):.2f} to {max(gains):.2f} times as soon in the engine's own store, "
            "at the shares of skipped tiles below."
        )
    return text


def _listed(names: Sequence[str]) -> str:
    ticked = [f"`{name}`" for name in names]
    return ticked[0] if len(ticked) == 1 else f"{', '.join(ticked[:-1])} and {ticked[-1]}"


def strategies(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A line per shape, context and strategy: what it does to times, memory and transfers. Empty where not measured.

    Times are those of one document, of the most layers that two strategies ran, so that no line compares numbers of layers;
    memory and transfers those of the most documents at a time.
    """
    found = []
    for place in _places(rows):
        timed: dict[tuple[str, str], float] = {}
        for column, part, name, more in (
            ("ms per token", "decode", "ms per token", {}),
            ("first token s", "prefill", "first token s", {"prefill": "dense"}),
            ("first token s, BSFA", "prefill", "first token s", {"prefill": "bsfa"}),
        ):
            held = [row for row in measured(rows, part=part, batch=1, **place, **more) if row["settings"]["allocation"]]
            layers = [row["settings"]["layers"] for row in held if row.get(name)]
            most = max((each for each in layers if layers.count(each) > 1), default=None)
            for row in held:
                if row["settings"]["layers"] == most and row.get(name):
                    timed[row["settings"]["allocation"], column] = row[name]
        batches = values(list(cells(rows, part="allocation", **place)), "batch")
        for row in measured(rows, part="allocation", batch=max(batches, default=None), **place):
            name = row["settings"]["allocation"]
            times = {
                column: timed.get((name, column)) for column in ("ms per token", "first token s", "first token s, BSFA")
            }
            found.append({
                "shape": place["shape"], "tokens": f"{place['context']:,}", "strategy": name, **times,
                "memory held / needed": row["held / needed"], "copies to move a document": row["calls per transfer"],
                "requests refused": row["refused"],
            })  # fmt: skip
    return found


def of_allocation(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What strategies do to times, where these were measured through them."""
    found = []
    parts = (("decode", "measured ms", "time per token"), ("prefill", "measured s", "time to first token"))
    for place in _places(rows):
        for part, name, what in parts:
            for batch in sorted(values(list(cells(rows, part=part, **place)), "batch")):
                for prefill in values(list(cells(rows, part=part, **place)), "prefill") or [None]:
                    more = {} if prefill is None else {"prefill": prefill}
                    spread = _spread(measured(rows, part=part, batch=batch, **place, **more), name)
                    if spread is not None:
                        low, high, gap = spread
                        where = f"{_at(place, batch)}, {low['settings']['layers']} layers"
                        how = f", {prefill} prefill" if prefill else ""
                        found.append(
                            f"**{what[0].upper()}{what[1:]}**{how} ({where}): "
                            f"`{low['settings']['allocation']}` {low[name]:.3g} to `{high['settings']['allocation']}` "
                            f"{high[name]:.3g} {'ms' if part == 'decode' else 's'}, {gap:.1f} % apart."
                        )
    if not found and any(True for _ in measured(rows, part="decode")):
        found.append(f"Times were measured through {_OWN} only: here strategies differ in memory and transfers alone.")
    return found


def of_memory(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What strategies do to host memory and transfers, with the most documents at a time."""
    found = []
    for place in _places(rows):
        for batch in sorted(values(list(cells(rows, part="allocation", **place)), "batch"))[-1:]:
            held = list(measured(rows, part="allocation", batch=batch, **place))
            if len(held) < 2:
                continue
            memory = sorted(held, key=lambda row: row["held / needed"])
            shown = ", ".join(f"`{row['settings']['allocation']}` {row['held / needed']:.2f}" for row in memory)
            sentence = (
                f"**Host memory** ({place['shape']}, documents of up to {place['context']:,} tokens, {batch} at a time): held, "
                f"times what is needed: {shown}."
            )
            calls = {row["settings"]["allocation"]: row["calls per transfer"] for row in held}
            if calls.get("segment") and calls.get("paged"):
                sentence += (
                    f" A document goes to another pool in {calls['paged']:,.0f} copies from `paged` and "
                    f"{calls['segment']:,.1f} from `segment`, {calls['paged'] / calls['segment']:,.0f} times fewer."
                )
            refused = [f"`{row['settings']['allocation']}` {row['refused']}" for row in held if row["refused"]]
            if refused:
                sentence += f" Refused in a pool of 1.2 times what is needed: {', '.join(refused)}; by others none."
            found.append(sentence)
    return found


def of_scaling(rows: Sequence[dict[str, Any]]) -> list[str]:
    """How far a prefill of few layers, brought to all of them, is from one of all layers."""
    found = []
    for place in _places(rows):
        for row in measured(rows, part="prefill", allocation=None, layers=_most_layers(rows, place["shape"]), **place):
            names = ("prefill", "batch", "chunk", "device")
            same = {name: row["settings"][name] for name in names}
            for few in measured(rows, part="prefill", allocation=None, **same, **place):
                if few["settings"]["layers"] < row["settings"]["layers"]:
                    found.append(
                        f"**Few layers for all** ({_at(place, same['batch'])}, {same['prefill']} prefill): all "
                        f"{row['settings']['layers']} layers take {row['first token s']:.3g} s; {few['settings']['layers']} of "
                        f"them, in proportion, {few['first token s']:.3g} s, "
                        f"{few['first token s'] / row['first token s']:.2f} times as long."
                    )
    return found


def of_bsfa(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What BSFA does to the time to first token, and whether that depends on the strategy."""
    found = []
    for place in _places(rows):
        for batch in sorted(values(list(cells(rows, part="prefill", **place)), "batch")):
            gains = {}
            for row in measured(rows, part="prefill", prefill="bsfa", batch=batch, **place):
                same = {name: row["settings"][name] for name in ("allocation", "layers", "device")}
                dense = next(measured(rows, part="prefill", prefill="dense", batch=batch, **same, **place), None)
                if dense is not None:
                    gains[same["allocation"]] = (dense["first token s"] / row["first token s"], row, dense)
            if not gains:
                continue
            key = None if None in gains else next(iter(gains))
            gain, row, dense = gains[key]
            skipped = row.get("skipped tiles")
            sentence = (
                f"**BSFA** (k = {row['settings']['k']}; {_at(place, batch)}): first token after {row['first token s']:.3g} s "
                f"instead of {dense['first token s']:.3g} s, {gain:.2f} times as fast"
                + (f" with {100 * skipped:.0f} % of the tiles skipped" if skipped is not None else "")
            )
            others = [gain for name, (gain, _, _) in gains.items() if name is not None]
            if len(others) > 1:
                sentence += f"; through the allocators {min(others):.2f} to {max(others):.2f} times"
            found.append(sentence + ".")
    return found
