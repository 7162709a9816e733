"""``python -m eval speed gather``: a decode step's exact attention, read from host memory through each allocator."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from alaya_hf.kernels.gpu import gather
from alaya_hf.kernels.gpu.host_memory import device_view
from alaya_hf.kernels.gpu.layout import TILE, Layout
from alaya_hf.kernels.gpu.step import Workspace
from alaya_hf.registry import ALLOCATORS
from alaya_hf.storage.allocators import KVPool, KVShape, block_table
from alaya_hf.storage.pinned import pinned_pool
from eval.environment import describe
from eval.report import markdown, write_csv
from eval.speed_alloc import built

_STEPS, _TURNS, _ROOM = 16, 8, 6
_BITS = (4, 2)


@dataclass
class Selection:
    """What a step selected: distinct tokens of every query head, and the buffers it goes on with."""

    work: Workspace
    q: Tensor
    records: Tensor

    @property
    def arguments(self) -> tuple[Tensor, ...]:
        """Of a gather, behind where the tokens are."""
        work = self.work
        return (
            self.q, work.ids, work.counts, work.thresholds, work.limits, work.scores, self.records, work.acc, work.ml,
            work.fetched,
        )  # fmt: skip

    @property
    def how(self) -> tuple[Any, ...]:
        """The rest."""
        return self.work.window_parts + self.work.parts, self.q.shape[2] ** -0.5, *_BITS, True, True

    def result(self) -> tuple[Tensor, Tensor]:
        """Copies of what a gather wrote."""
        first = self.how[0]
        part = slice(first, first + self.work.gather_parts)
        return self.work.acc[..., part, :].clone(), self.work.ml[..., part, :].clone()


def select(
    shape: KVShape, group: int, tokens: int, cap: int, records: Tensor, device: torch.device, seed: int
) -> Selection:
    """Random tokens, ascending per head; nobody else's, so that each of them is fetched."""
    layout = Layout(shape.head_dim, *_BITS)
    work = Workspace(1, shape.kv_heads, group, layout, tokens, TILE, cap, device, shape.dtype)
    generator = torch.Generator().manual_seed(seed)
    for head in range(shape.kv_heads):
        chosen = torch.randperm(tokens, generator=generator)[: group * cap].view(group, cap).sort(dim=-1).values
        work.ids[0, head] = chosen.int().to(device)
    work.counts.fill_(cap)
    # No score reaches this threshold, so no head takes another one's token for served.
    work.thresholds.fill_(float("inf"))
    work.limits.fill_(-1)
    for buffer in (work.scores, work.acc, work.ml):
        buffer.zero_()
    q = torch.randn(1, shape.kv_heads * group, shape.head_dim, generator=generator).to(device, shape.dtype)
    return Selection(work, q, records)


def scatter(pool: KVPool[Any], tokens: int) -> None:
    """Leave a pool of blocks as others' requests would: free blocks in no order."""
    generator = torch.Generator().manual_seed(0)
    held = [pool.allocate(64) for _ in range(_ROOM * tokens // 64)]
    for place in torch.randperm(len(held), generator=generator).tolist():
        pool.free(held[place])


def fill(pool: KVPool[Any], kv: Tensor) -> int:
    """A sequence that grew in turns with another one; returns its number.

    Parameters
    ----------
    kv : Tensor ``[kv_heads, tokens, 2, head_dim]``
    """
    tokens = kv.shape[1]
    if hasattr(pool, "block"):
        scatter(pool, tokens)
    mine, other = pool.allocate(0), pool.allocate(0)
    step = tokens // _STEPS
    for start in range(0, tokens, step):
        count = min(step, tokens - start)
        pool.extend(mine, count)
        pool.extend(other, count)
        pool.write(mine, 0, start, kv[:, start : start + count])
    pool.free(other)
    return mine


def places(
    names: list[str], shape: KVShape, kv: Tensor, device: torch.device
) -> Iterator[tuple[str, str, KVPool[Any], int]]:
    """Filled pools: allocator, where the memory is, pool and sequence. What only maps device memory is compared there."""
    tokens, cuda = kv.shape[1], device.type == "cuda"
    for name in names:
        mapped = name == "virtual"
        for where in ("device",) if mapped else ("host", "device") if name == "contiguous" else ("host",):
            at = device if where == "device" else torch.device("cpu")
            capacity = _ROOM * tokens * shape.row_bytes
            pool = built(name, shape, tokens).open(shape, capacity, at, pinned=cuda and where == "host")
            yield name, where, pool, fill(pool, kv)


def through(
    pool: KVPool[Any], sequence: int, selections: list[Selection], device: torch.device
) -> tuple[list[Callable[[], None]], int]:
    """A gather through the pool per selection, and the blocks of the table."""
    table = block_table(pool, [sequence], 0)
    memory = table.pool
    if device.type == "cuda" and memory.device.type == "cpu":
        memory = device_view(memory, device)
    offsets = table.offsets.to(device)

    def step(each: Selection) -> Callable[[], None]:
        return lambda: gather.gather_attention_blocks(memory, offsets, *each.arguments, table.block, *each.how)

    return [step(each) for each in selections], offsets.shape[1]


def measure(
    names: list[str], shape: KVShape, group: int, tokens: int, cap: int, device: torch.device,
    timed: Callable[[list[Callable[[], Any]]], float],
) -> list[dict[str, Any]]:  # fmt: skip
    """The engine's own store, and every allocator.

    Raises
    ------
    RuntimeError
        If what was read through an allocator is not what the store holds.
    """
    generator = torch.Generator().manual_seed(0)
    kv = torch.randn(shape.kv_heads, tokens, 2, shape.head_dim, generator=generator).to(shape.dtype)
    records = Layout(shape.head_dim, *_BITS).allocate(1, shape.kv_heads, tokens, device).zero_()
    selections = [select(shape, group, tokens, cap, records, device, seed) for seed in range(_TURNS)]
    store = pinned_pool().allocate((1, *kv.shape), shape.dtype)
    store[0] = kv
    view = device_view(store, device) if device.type == "cuda" else store

    def own(each: Selection) -> Callable[[], None]:
        return lambda: gather.gather_attention(view, *each.arguments, *each.how)

    moved = shape.kv_heads * group * cap * 2 * shape.head_dim * shape.dtype.itemsize
    rows: list[dict[str, Any]] = []

    def row(name: str, where: str, steps: list[Callable[[], None]], blocks: int) -> None:
        us = timed(steps)
        rows.append(
            {
                "tokens": tokens,
                "cap": cap,
                "store": name,
                "memory": where,
                "blocks": blocks,
                "us": us,
                "GB/s": moved / us / 1e3,
            }
        )

    steps = [own(each) for each in selections]
    steps[0]()
    expected = selections[0].result()
    row("engine's own", "host", steps, 0)
    for name, where, pool, sequence in places(names, shape, kv, device):
        steps, blocks = through(pool, sequence, selections, device)
        selections[0].work.acc.zero_()
        steps[0]()
        if not all(torch.equal(a, b) for a, b in zip(selections[0].result(), expected, strict=True)):
            raise RuntimeError(f"{name} on the {where} does not give what the store gives; nothing was timed")
        row(name, where, steps, blocks)
    for this in rows:
        base = next((r["us"] for r in rows if r["store"] == "contiguous" and r["memory"] == this["memory"]), None)
        this["x contiguous"] = this["us"] / base if base else None
    return rows


def gathering(
    contexts: Annotated[str, typer.Option(help="Context lengths, multiples of 64, comma-separated.")] = "32768,131072",
    caps: Annotated[str, typer.Option(help="Tokens per query head, comma-separated.")] = "32,256",
    allocators: Annotated[str, typer.Option(help="Allocators, comma-separated; default all.")] = "",
    shape: Annotated[str, typer.Option(help="KV heads, group, head dimension.")] = "8,4,128",
    output: Annotated[Path, typer.Option(help="Folder for table and CSV.")] = Path("results/speed-gather"),
) -> None:
    """A decode step's exact attention through every allocator, against the same through contiguous memory, on a CUDA device."""
    from eval.speed_kernel import timed

    if not torch.cuda.is_available():
        raise typer.BadParameter("expected a CUDA device, found none")
    names = [name.strip() for name in allocators.split(",") if name.strip()] or ALLOCATORS.names()
    unknown = sorted(set(names) - set(ALLOCATORS.names()))
    if unknown:
        raise typer.BadParameter(f"unknown allocators {unknown}; available: {', '.join(ALLOCATORS.names())}")
    kv_heads, group, dim = (int(x) for x in shape.split(","))
    rows: list[dict[str, Any]] = []
    text = ""
    for tokens in (int(n) for n in contexts.split(",")):
        for cap in (int(n) for n in caps.split(",")):
            rows += measure(names, KVShape(1, kv_heads, dim), group, tokens, cap, torch.device("cuda"), timed)
            output.mkdir(parents=True, exist_ok=True)
            write_csv(output / "gather.csv", rows)
            text = f"{describe()}; {kv_heads * group} query heads, {kv_heads} KV heads, d {dim}\n\n{markdown(rows)}\n"
            (output / "gather.md").write_text(text, encoding="utf-8")
    typer.echo(text)
