"""``python -m eval speed alloc``: what the strategies of memory allocation cost under a legal workload."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.progress import track

from alaya_hf.errors import PoolFullError
from alaya_hf.registry import ALLOCATORS
from alaya_hf.storage.allocators import Allocator, Contiguous, KVPool, KVShape
from alaya_hf.storage.transfer import transfer
from eval.environment import describe
from eval.legal_trace import Event, Needed, document_lengths, legal_trace
from eval.plots import allocation
from eval.replay import GIB, replay
from eval.report import markdown, write_csv

#: Keys and values of Llama-3-8B: 128 KiB per token.
LLAMA = KVShape(layers=32, kv_heads=8, head_dim=128)
#: The same tokens in 1/512 of the bytes, for what is done with real memory.
SMALL = KVShape(layers=4, kv_heads=1, head_dim=16)


def built(name: str, shape: KVShape, longest: int) -> Allocator:
    """An allocator by name, for sequences of up to ``longest`` tokens; pages hold as many tokens as 2 MiB do of Llama-3-8B's."""
    parameters: dict[str, Any] = {"kind": name}
    if name in ("contiguous", "virtual"):
        parameters["max_tokens"] = longest
    if name == "virtual":
        parameters["page"] = (2 << 20) // LLAMA.row_bytes * shape.row_bytes
    return ALLOCATORS.build(parameters)


def needed_tokens(events: Sequence[Event]) -> int:
    """Most tokens that have to be in memory at a time."""
    needed, most = Needed(), 0
    for event in events:
        needed.apply(event)
        most = max(most, needed.tokens)
    return most


def _memory(name: str, events: Sequence[Event], most: int, longest: int, live: int) -> tuple[dict[str, Any], list[Any]]:
    """Room for everyone: how much is taken."""
    ample = live * 6 * longest * LLAMA.token_bytes
    pool = built(name, LLAMA, longest).open(LLAMA, ample)
    result = replay(events, pool)
    if result.refused:
        raise PoolFullError(f"{name} refused {result.refused} sequences of a pool that was to hold all; raise --live.")
    points, stats = result.points, pool.stats
    reserved, used = (sum(point[key] for point in points) for key in ("reserved", "used"))
    needed = sum(point["needed"] for point in points)
    row = {
        "allocator": name,
        "needed GiB": most * LLAMA.token_bytes / GIB,
        "peak GiB": stats.peak_reserved / GIB,
        "most wasted GiB": max(point["reserved"] - point["used"] for point in points),
        "wasted %": 100 * (1 - used / reserved),
        "duplicated %": 100 * (used - needed) / reserved,
        "copies": stats.copies,
        "copied GiB": stats.bytes_copied / GIB,
    }
    return row, points


def _pressure(name: str, events: Sequence[Event], capacity: int, longest: int) -> tuple[dict[str, Any], list[Any]]:
    """A pool that is hardly large enough: what fragmentation does."""
    allocator = built(name, LLAMA, longest)
    pool, store = (allocator.open(LLAMA, capacity) for _ in range(2))
    result = replay(events, pool, store)
    fragmentation = [point["fragmentation"] for point in result.points]
    row = {
        "allocator": name,
        "refused": result.refused,
        "fragmentation mean": statistics.fmean(fragmentation) if fragmentation else None,
        "most": max(fragmentation, default=None),
        "transfers": result.transfers,
        "calls": result.calls,
        "calls per transfer": result.calls / max(1, result.transfers),
        "block by block": result.apart,
        "moved GiB": result.moved / GIB,
    }
    return row, result.points


def _times(name: str, events: Sequence[Event], peak: float, longest: int) -> dict[str, Any]:
    """Time in the allocator, with real memory at a small shape: half as much again as the trace takes at most (GiB)."""
    share = SMALL.token_bytes / LLAMA.token_bytes
    slack = 1.0 if name == "contiguous" else 1.5
    pool = built(name, SMALL, longest).open(SMALL, int(peak * GIB * share * slack), "cpu")
    replay(events, pool, sample=False)  # has the system make what memory is touched
    copied = pool.stats.bytes_copied
    result = replay(events, pool, sample=False)
    row: dict[str, Any] = {"allocator": name, "refused": result.refused}
    for kind in ("allocate", "extend", "token", "fork", "free"):
        times = result.seconds.get(kind, [])
        row[f"{kind} us"] = 1e6 * statistics.median(times) if times else None
        if kind == "token":
            row["token p99 us"] = 1e6 * float(np.quantile(times, 0.99)) if times else None
    row["total s"] = sum(map(sum, result.seconds.values()))
    row["copied GiB"] = (pool.stats.bytes_copied - copied) / GIB
    return row


def worn(name: str, shape: KVShape, tokens: int, device: str) -> tuple[KVPool, int]:
    """A pool of ``2.2 * tokens`` that was full of eight sequences growing in turns, half of which left; and a new sequence."""
    pool = built(name, shape, tokens).open(shape, int(2.2 * tokens) * shape.token_bytes, device)
    made: list[int] = []
    try:
        for _ in range(8):
            made.append(pool.allocate(0))
        while True:
            for sequence in made:
                pool.extend(sequence, 64)
    except PoolFullError:
        pass
    for sequence in made[::2]:
        pool.free(sequence)
    for sequence in made[1::2]:
        try:
            return pool, pool.allocate(tokens)
        except PoolFullError:
            pool.free(sequence)
    return pool, pool.allocate(tokens)


def _transfers(name: str, tokens: int, repeats: int) -> list[dict[str, Any]]:
    """Between two worn pools of the full shape in host memory."""
    source, sequence = worn(name, LLAMA, tokens, "cpu")
    target, other = worn(name, LLAMA, tokens, "cpu")
    target.free(other)
    rows = []
    for join in (True, False) if name in ("paged", "segment") else (True,):
        reports = []
        for _ in range(repeats + 1):
            copy, report = transfer(source, sequence, target, join)
            target.free(copy)
            reports.append(report)
        # The first one makes pages.
        seconds = statistics.median(report.seconds for report in reports[1:])
        calls, size = reports[-1].calls, reports[-1].bytes
        what = name if join else f"{name}, block by block"
        rows.append({"allocator": what, "calls": calls, "KiB per call": size / calls / 1024, "ms": 1e3 * seconds})
        rows[-1]["GB/s"] = size / seconds / 1e9
    return rows


def _memcpy(tokens: int, repeats: int) -> dict[str, Any]:
    """One copy of as many bytes: what the memory can do."""
    size = tokens * LLAMA.token_bytes
    whole = KVShape(1, LLAMA.kv_heads, LLAMA.head_dim)
    allocator = Contiguous(max_tokens=tokens * LLAMA.layers)
    pools = [allocator.open(whole, size, "cpu") for _ in range(2)]
    sequence = pools[0].allocate(tokens * LLAMA.layers)
    seconds = []
    for _ in range(repeats + 1):
        copy, report = transfer(pools[0], sequence, pools[1])
        pools[1].free(copy)
        seconds.append(report.seconds)
    ms = 1e3 * statistics.median(seconds[1:])
    return {"allocator": "one copy", "calls": 1, "KiB per call": size / 1024, "ms": ms, "GB/s": size / ms / 1e6}


def alloc(
    allocators: Annotated[str, typer.Option(help="Allocators, comma-separated; default all.")] = "",
    documents: Annotated[int, typer.Option(help="Documents of the trace.")] = 32,
    live: Annotated[int, typer.Option(help="Documents read and asked about at a time.")] = 6,
    questions: Annotated[int, typer.Option(help="Questions per document, mean.")] = 4,
    chunk: Annotated[int, typer.Option(help="Tokens of a prefill chunk.")] = 4096,
    shortest: Annotated[int, typer.Option(help="Tokens of the shortest document.")] = 8192,
    longest: Annotated[int, typer.Option(help="Tokens of the longest; the others are stretched with it.")] = 524288,
    room: Annotated[
        float, typer.Option(help="Capacity under pressure, in multiples of the tokens needed at most.")
    ] = 1.2,
    transfer_tokens: Annotated[
        int, typer.Option(help="Tokens of timed transfers, 128 KiB each, four times; 0: none.")
    ] = 4096,
    repeats: Annotated[int, typer.Option(help="Timed transfers; the median counts.")] = 5,
    data_dir: Annotated[Path | None, typer.Option(help="Folder with cuad.jsonl.gz, for real lengths.")] = None,
    seed: Annotated[int, typer.Option(help="Of the trace.")] = 0,
    output: Annotated[Path, typer.Option(help="Folder for tables, CSV, plot and trace.")] = Path("results/speed-alloc"),
) -> None:
    """Memory, fragmentation, allocation time and transfers of every allocator under a trace of legal questions, on the host."""
    names = [name.strip() for name in allocators.split(",") if name.strip()] or ALLOCATORS.names()
    unknown = sorted(set(names) - set(ALLOCATORS.names()))
    if unknown:
        raise typer.BadParameter(f"unknown allocators {unknown}; available: {', '.join(ALLOCATORS.names())}")
    rng = np.random.default_rng(seed)
    lengths = document_lengths(documents, rng, shortest, longest, data_dir)
    events = legal_trace(lengths, rng, live, questions, chunk)
    most = needed_tokens(events)
    # Answers and questions come on top of a document of the longest kind.
    reserve = longest + 1024
    tables: dict[str, list[dict[str, Any]]] = {"memory": [], "pressure": [], "times": [], "transfers": []}
    points: list[dict[str, Any]] = []
    for name in track(names, "allocators"):
        row, ample = _memory(name, events, most, reserve, live)
        tables["memory"].append(row)
        row, tight = _pressure(name, events, int(room * most) * LLAMA.token_bytes, reserve)
        tables["pressure"].append(row)
        for pool, found in (("ample", ample), ("tight", tight)):
            points += [{"allocator": name, "pool": pool, **point} for point in found]
        tables["times"].append(_times(name, events, tables["memory"][-1]["peak GiB"], reserve))
        if transfer_tokens:
            tables["transfers"] += _transfers(name, transfer_tokens, repeats)
    if transfer_tokens:
        tables["transfers"].append(_memcpy(transfer_tokens, repeats))
    text = _write(tables, points, events, lengths, output)
    typer.echo(text)


def _write(
    tables: dict[str, list[dict[str, Any]]],
    points: Sequence[dict[str, Any]],
    events: Sequence[Event],
    lengths: Sequence[int],
    output: Path,
) -> str:
    output.mkdir(parents=True, exist_ok=True)
    trace = [list(asdict(event).values()) for event in events]
    (output / "trace.json").write_text(json.dumps({"lengths": list(lengths), "events": trace}), encoding="utf-8")
    forks = sum(event.kind == "fork" for event in events)
    text = (
        f"{describe()}\n\n{len(lengths)} documents of {min(lengths):,} to {max(lengths):,} tokens (median "
        f"{int(statistics.median(lengths)):,}), {forks} questions, {len(events):,} events\n"
    )
    for name, rows in tables.items():
        if rows:
            write_csv(output / f"{name}.csv", rows)
            text += f"\n{name}\n\n{markdown(rows)}\n"
    write_csv(output / "series.csv", points)
    allocation(points, output / "alloc.png")
    (output / "alloc.md").write_text(text, encoding="utf-8")
    return text
