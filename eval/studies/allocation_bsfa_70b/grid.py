"""The study's cells in the order of their worth."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from eval.studies.allocation_bsfa_70b.measure import Bench

PARTS = ("plan", "decode", "prefill", "allocation")
#: Prefills of more tokens than this, all rows together, run few layers: their time grows with the square of a row's.
_LONG = 131072


@dataclass
class Grid:
    """What is asked for.

    Parameters
    ----------
    parts : list of str
    allocators : list of str
    allocates : bool
        Whether times depend on the allocator: without, one cell stands for all of them.
    prefills, baselines : list of str
    contexts : list of int
    batches : list of int or None
        None: as many as fit.
    few : int
        Layers of cells that do not run all that the model has.
    documents : int
    device : str
        The machine that measures.
    machine : dict
        The machine that the whole shape is planned for, as it is written down.
    """

    parts: Sequence[str]
    allocators: Sequence[str]
    allocates: bool
    prefills: Sequence[str]
    baselines: Sequence[str]
    contexts: Sequence[int]
    batches: Sequence[int | None]
    few: int
    documents: int
    device: str
    machine: dict[str, Any]


@dataclass
class Cell:
    """One of them.

    Parameters
    ----------
    settings : dict
        What it is found under.
    run : callable
    """

    settings: dict[str, Any]
    run: Callable[[], dict[str, Any]] = field(repr=False)

    @property
    def key(self) -> tuple[Any, ...]:
        """What tells it from others."""
        return tuple(sorted(self.settings.items()))

    @property
    def place(self) -> tuple[Any, ...]:
        """What its buffers' sizes follow from."""
        return tuple(self.settings.get(name) for name in ("context", "batch"))

    @property
    def name(self) -> str:
        """For people."""
        shown = ("part", "context", "batch", "system", "prefill", "allocation", "layers")
        return ", ".join(f"{name} {self.settings[name]}" for name in shown if self.settings.get(name) is not None)

    def expected(self, rows: Iterable[dict[str, Any]]) -> float:
        """Seconds, at most, from what like cells took; 0 where none was measured."""
        mine, found = self.settings, 0.0
        if mine["part"] != "prefill":
            return found
        for row in rows:
            other = row["settings"]
            same = all(mine.get(name) == other.get(name) for name in ("part", "shape", "device", "prefill"))
            if same and "measured s" in row:
                ratio = max(1.0, mine["context"] / other["context"])
                found = row["measured s"] * ratio**2 * mine["layers"] / other["layers"] * mine["batch"] / other["batch"]
        return found


#: Part, whether of the first context, whether of one row, whether through the engine's own store (or a baseline): most worthwhile
#: first. What is left out of it, and what is cut off by a limit of time, is least.
_ORDER = (
    ("decode", True, True, True), ("prefill", True, True, True), ("decode", True, True, False),
    ("decode", True, False, True), ("decode", False, True, True), ("prefill", True, True, False),
    ("decode", True, False, False), ("decode", False, False, True), ("decode", False, True, False),
    ("prefill", False, True, True), ("prefill", True, False, True), ("decode", False, False, False),
    ("prefill", True, False, False), ("prefill", False, True, False), ("prefill", False, False, True),
    ("prefill", False, False, False),
)  # fmt: skip


def grid(bench: Bench, asked: Grid) -> Iterator[Cell]:
    """Every cell once: what the shape takes; what is timed, most worthwhile first; the allocators' traces."""
    yield from _plans(bench, asked)

    def rank(cell: Cell) -> int:
        place = cell.settings
        first, one = place["context"] == asked.contexts[0], place["batch"] == 1
        return _ORDER.index((place["part"], first, one, place["allocation"] is None))

    timed = {cell.key: cell for cell in (*_decoding(bench, asked), *_prefills(bench, asked))}
    yield from sorted(timed.values(), key=rank)
    yield from _traces(bench, asked)


def _plans(bench: Bench, asked: Grid) -> Iterator[Cell]:
    if "plan" not in asked.parts:
        return
    for context in asked.contexts:
        common = {"shape": bench.shape, "context": context, **asked.machine, "chunk": bench.chunk}
        yield Cell({"part": "limits", **common}, lambda c=context: bench.limits(c))  # type: ignore[misc]
        for batch in _rows(bench, asked, context):
            yield Cell({"part": "plan", "batch": batch, **common}, lambda c=context, b=batch: bench.plan(c, b))  # type: ignore[misc]


def _rows(bench: Bench, asked: Grid, context: int) -> list[int]:
    """Batches of a context; the largest is 1 where nothing fits, so that it says why."""
    found = [max(1, bench.limits(context)["alaya rows"]) if rows is None else rows for rows in asked.batches]
    return list(dict.fromkeys(found))


def _place(bench: Bench, asked: Grid, part: str, context: int, batch: int, layers: int) -> dict[str, Any]:
    found = {
        "part": part, "shape": bench.shape, "device": asked.device, "context": context, "batch": batch, "layers": layers
    }  # fmt: skip
    return found | ({"weights": "shared"} if bench.shared else {})


def _decoding(bench: Bench, asked: Grid) -> Iterator[Cell]:
    if "decode" not in asked.parts:
        return
    allocations: list[str | None] = [None, *(asked.allocators if asked.allocates else ())]

    def cell(context: int, batch: int, system: str, layers: int, allocation: str | None = None) -> Cell:
        settings = _place(bench, asked, "decode", context, batch, layers) | {"system": system, "allocation": allocation}
        return Cell(settings | {"new": bench.new}, lambda: bench.decode(context, batch, system, layers, allocation))

    for context in asked.contexts:
        resident = bench.limits(context)["resident rows"]
        for batch in _rows(bench, asked, context):
            for allocation in allocations:
                whole = batch == 1 or allocation is None
                layers = bench.fitting(context, batch, bench.held if whole else asked.few)
                yield cell(context, batch, "alaya", layers, allocation)
        for system in asked.baselines:
            # What offloads is bound by the bus in every layer; what does not fit says how fast it would be on few layers.
            fits = resident >= 1 or bench.held <= asked.few
            yield cell(context, 1, system, bench.held if fits and system != "offloaded" else asked.few)
            if system != "offloaded" and len(asked.batches) > 1:
                # Where the whole shape is there, one row more than should fit, so that nobody has to believe the plan.
                tried = [resident, resident + 1] if bench.held == bench.all_layers else [resident]
                for batch in tried if resident else ():
                    yield cell(context, batch, system, bench.held)


def _prefills(bench: Bench, asked: Grid) -> Iterator[Cell]:
    if "prefill" not in asked.parts:
        return
    for context in asked.contexts:
        for batch in _rows(bench, asked, context):
            for allocation in [None, *(asked.allocators if asked.allocates else ())]:
                few = allocation is not None or context * batch > _LONG
                for name in asked.prefills:
                    layers = bench.fitting(context, batch, asked.few if few else bench.held)
                    settings = _place(bench, asked, "prefill", context, batch, layers)
                    settings |= {"prefill": name, "allocation": allocation, "chunk": bench.chunk}
                    settings |= {"k": bench.k} if name == "bsfa" else {}
                    yield Cell(
                        settings,
                        lambda n=name, c=context, b=batch, y=layers, a=allocation: bench.prefill(n, c, b, y, a),  # type: ignore[misc]
                    )


def _traces(bench: Bench, asked: Grid) -> Iterator[Cell]:
    if "allocation" not in asked.parts:
        return
    for context in asked.contexts:
        for batch in _rows(bench, asked, context):
            for name in asked.allocators:
                settings = {
                    "part": "allocation",
                    "shape": bench.shape,
                    "context": context,
                    "batch": batch,
                    "allocation": name,
                }
                yield Cell(
                    settings | {"documents": asked.documents, "chunk": bench.chunk},
                    lambda n=name, c=context, b=batch: bench.allocation(n, c, b, asked.documents),  # type: ignore[misc]
                )
