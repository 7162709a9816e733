"""Plays a trace of allocations into a pool and keeps the books."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from alaya_hf.errors import PoolFullError
from alaya_hf.storage.allocators import KVPool
from alaya_hf.storage.transfer import plan, transfer
from eval.legal_trace import Event, Needed

GIB = 1 << 30


@dataclass
class Replay:
    """What happened.

    Attributes
    ----------
    points : list of dict
        After every event but the tokens of answers: ``event``, ``needed``, ``reserved``, ``used`` (GiB), ``fragmentation``.
    seconds : dict
        Kind of operation (``token``: growth by one) -> seconds of each.
    refused : int
        Sequences that found no room.
    calls, apart, moved : int
        Copies of all transfers to the second pool, joined and block by block, and bytes.
    transfers : int
    """

    points: list[dict[str, float]] = field(default_factory=list)
    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    refused: int = 0
    calls: int = 0
    apart: int = 0
    moved: int = 0
    transfers: int = 0


def replay(events: Sequence[Event], pool: KVPool, store: KVPool | None = None, sample: bool = True) -> Replay:
    """Play a trace.

    A sequence that finds no room is given up: what it had is freed, and what would have forked from it is refused as well.

    Parameters
    ----------
    events : sequence of Event
    pool : KVPool
    store : KVPool, optional
        Where finished documents are copied, and stay until they are freed.
    sample : bool
        Keep ``points``.
    """
    result, needed = Replay(), Needed()
    here: dict[int, int] = {}
    there: dict[int, int] = {}
    size = pool.shape.token_bytes / GIB

    def timed(kind: str, call: Any, *arguments: Any) -> Any:
        began = time.perf_counter()
        try:
            return call(*arguments)
        finally:
            result.seconds[kind].append(time.perf_counter() - began)

    for place, event in enumerate(events):
        needed.apply(event)
        name, number = event.sequence, here.get(event.sequence)
        try:
            if event.kind == "allocate":
                here[name] = timed("allocate", pool.allocate, event.tokens)
            elif event.kind == "fork":
                if event.parent in here:
                    here[name] = timed("fork", pool.fork, here[event.parent], event.tokens)
                else:
                    result.refused += 1
            elif number is None:
                continue
            elif event.kind == "extend":
                timed("token" if event.tokens == 1 else "extend", pool.extend, number, event.tokens)
            elif event.kind == "free":
                timed("free", pool.free, here.pop(name))
                if store is not None and name in there:
                    store.free(there.pop(name))
            elif event.kind == "store" and store is not None:
                there[name] = _move(pool, number, store, result)
        except PoolFullError:
            result.refused += 1
            if event.kind == "extend":
                pool.free(here.pop(name))
        if sample and (event.kind != "extend" or event.tokens > 1):
            stats = pool.stats
            if stats.reserved:
                result.points.append(
                    {
                        "event": place,
                        "needed": needed.tokens * size,
                        "reserved": stats.reserved / GIB,
                        "used": stats.used / GIB,
                        "fragmentation": stats.fragmentation,
                    }
                )
    return result


def _move(pool: KVPool, number: int, store: KVPool, result: Replay) -> int:
    copy, report = transfer(pool, number, store)
    apart = plan(pool.transfer_runs(number), store.transfer_runs(copy), pool.shape.row_bytes, join=False)
    result.calls += report.calls
    result.apart += len(apart.size)
    result.moved += report.bytes
    result.transfers += 1
    return copy
