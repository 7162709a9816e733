"""``python -m eval speed kernel``: one layer's decode step on a GPU, stage by stage, against resident SDPA of the same run."""

from __future__ import annotations

import csv
import math
import platform
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from alaya_hf.kernels.gpu import block_scores, cut, gather, gather_blocks, lowbit, merge, quantise, summarise, window
from alaya_hf.kernels.gpu.block_layout import BlockLayout
from alaya_hf.kernels.gpu.coarse_step import CoarseWorkspace, coarse_step
from alaya_hf.kernels.gpu.host_memory import device_view
from alaya_hf.kernels.gpu.layout import TILE, Layout
from alaya_hf.kernels.gpu.step import Workspace, decode_step
from alaya_hf.planner.device_case import graph_seconds
from alaya_hf.storage.pinned import pinned_pool
from eval.synthetic import _Head

INIT, LOCAL, RING = 128, 512, 640
_CHUNK = 1 << 17


@dataclass(frozen=True)
class System:
    """What is measured: bits of the low-bit copy, or blocks in its place, and the query.

    `cap` is in tokens, with blocks in blocks; with `alpha` 0 it decides alone.
    """

    name: str
    key_bits: int = 4
    value_bits: int = 2
    cap: int = 32
    alpha: float = 0.012
    block: int = 0
    strategy: str = "representatives"
    means: bool = False

    def layout(self, head_dim: int) -> Layout | BlockLayout:
        """What lies on the device."""
        if not self.block:
            return Layout(head_dim, self.key_bits, self.value_bits)
        count = 4 if self.strategy == "representatives" else 1
        return BlockLayout(head_dim, self.block, self.strategy, count, self.means)


SYSTEMS = {
    system.name: system
    for system in (
        System("two precisions"),
        System("block_means", value_bits=0),
        System("4-bit values", value_bits=4),
        System("8-bit keys", key_bits=8),
        System("coarse", cap=4, alpha=0, block=128),
        System("coarse, 16 blocks", cap=16, alpha=0, block=128),
        System("coarse, block_means", cap=16, alpha=0, block=16, strategy="mean", means=True),
    )
}


@dataclass
class Layer:
    """A layer's context: dense on the device for the baseline, in host memory for ours."""

    keys: Tensor
    values: Tensor
    store: Tensor
    queries: Tensor
    records: dict[Layout | BlockLayout, Tensor]
    window_k: Tensor
    window_v: Tensor
    new_k: Tensor
    new_v: Tensor


def synthetic_device_layer(
    kv_heads: int, group: int, head_dim: int, tokens: int, queries: int, critical: int, seed: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values ``[1, kv_heads, tokens, head_dim]`` and queries ``[queries, 1, heads, head_dim]`` made on the device.

    The distribution is that of :func:`eval.synthetic.synthetic_layer`, made with the same parts.
    """
    beta = -math.log(0.012) * math.sqrt(head_dim)
    topics = max(1, min(256, tokens // (2 * critical)))
    with torch.device("cuda"):
        generator = torch.Generator("cuda").manual_seed(seed)
        keys = torch.empty(1, kv_heads, tokens, head_dim, dtype=dtype)
        values = torch.empty_like(keys)
        found = torch.empty(queries, 1, kv_heads, group, head_dim, dtype=dtype)
        for h in range(kv_heads):
            head = _Head(head_dim, topics, 24, beta, generator)
            for start in range(0, tokens, _CHUNK):
                stop = min(tokens, start + _CHUNK)
                keys[0, h, start:stop] = head.background(stop - start, generator).to(dtype)
                values[0, h, start:stop] = torch.randn(stop - start, head_dim, generator=generator).to(dtype)
            places = torch.randperm(tokens, generator=generator)[: topics * critical]
            keys[0, h, places] = head.planted(critical, generator).to(dtype)
            shared = torch.randint(topics, (queries, 1), generator=generator)
            own = torch.randint(topics, (queries, group), generator=generator)
            topic = torch.where(torch.rand(queries, group, generator=generator) < 0.5, shared, own)
            found[:, 0, h] = head.queries(topic.flatten(), generator).view(queries, group, head_dim).to(dtype)
    return keys, values, found.flatten(2, 3)


def timed(steps: list[Callable[[], Any]], repeats: int = 15) -> float:
    """Median microseconds per step of a CUDA graph that runs all `steps` one after the other."""
    return 1e6 * graph_seconds(steps, repeats)


def bandwidths(pinned: Tensor) -> tuple[float, float]:
    """GB/s of a copy inside the device (read and written bytes) and from pinned host memory."""
    a = torch.empty(1 << 32, dtype=torch.int8, device="cuda")
    b = torch.empty_like(a)
    inside = 2 * a.numel() / timed([lambda: b.copy_(a)] * 4) / 1e3
    part = pinned.flatten().view(torch.int8)[: 1 << 28]
    bus = part.numel() / timed([lambda: b[: part.numel()].copy_(part, non_blocking=True)] * 2, 5) / 1e3
    return inside, bus


def _make_layer(system: list[System], shape: tuple[int, int, int], tokens: int, store: Tensor, seed: int, critical: int,
                queries: int, dtype: torch.dtype) -> Layer:  # fmt: skip
    kv_heads, group, d = shape
    keys, values, q = synthetic_device_layer(kv_heads, group, d, tokens, queries, critical, seed, dtype)
    low = tokens // TILE * TILE - RING  # the rest is the window's
    records = {}
    zero = torch.zeros(1, dtype=torch.int32, device="cuda")
    for layout in {s.layout(d) for s in system}:
        records[layout] = layout.allocate(1, kv_heads, low + 4 * TILE, "cuda")
        taken = (keys[:, :, INIT : INIT + low], values[:, :, INIT : INIT + low], records[layout], zero, zero + low)
        if isinstance(layout, BlockLayout):
            summarise.summarise_blocks(*taken, layout.tokens, layout.strategy, layout.count, layout.values)
        else:
            quantise.quantise_tokens(*taken, layout.key_bits, layout.value_bits)
    for h in range(kv_heads):
        store[0, h, : tokens - INIT, 0].copy_(keys[0, h, INIT:])
        store[0, h, : tokens - INIT, 1].copy_(values[0, h, INIT:])
    window_k, window_v = (torch.zeros(1, kv_heads, INIT + RING, d, dtype=dtype, device="cuda") for _ in "kv")
    slots = INIT + torch.arange(low, tokens - INIT, device="cuda") % RING
    for to, source in ((window_k, keys), (window_v, values)):
        to[:, :, :INIT] = source[:, :, :INIT]
        to[:, :, slots] = source[:, :, INIT + low :]
    return Layer(keys, values, store, q, records, window_k, window_v, keys[:, :, 0].clone(), values[:, :, 0].clone())


def _stages(
    work: Workspace, layer: Layer, q: Tensor, total: Tensor, low: Tensor, scaling: float, beta: float
) -> dict[str, Callable[[], None]]:
    """Single stages, each on what the ones before it left in the buffers."""
    bits = (work.layout.key_bits, work.layout.value_bits)
    records, k, v = layer.records[work.layout], layer.new_k, layer.new_v
    after = work.window_parts + work.parts
    scratch = torch.empty_like(work.best)  # the merge would reset what the other stages read

    def at_window() -> None:
        window.window_attention(q, k, v, layer.window_k, layer.window_v, layer.store, total, low, work.best, work.acc,
                                work.ml, 0, INIT, scaling)  # fmt: skip
        quantise.extend_lowbit(layer.window_k, layer.window_v, records, total, low, INIT, LOCAL, *bits)

    def scan(beta: float) -> None:
        lowbit.lowbit_pass(records, q, low, work.best, work.tile_max, work.scores, work.acc, work.ml, work.window_parts,
                           work.parts, scaling, beta, *bits)  # fmt: skip

    def select() -> None:
        cut.cut(work.tile_max, work.scores, work.best, work.ml, low, work.ids, work.counts, work.thresholds, work.limits,
                work.chosen, work.window_parts, work.parts, scaling, beta, 1.0)  # fmt: skip

    def attend() -> None:
        gather.gather_attention(layer.store, q, work.ids, work.counts, work.thresholds, work.limits, work.scores,
                                records, work.acc, work.ml, work.fetched, after, scaling, *bits, True, True)  # fmt: skip

    def together() -> None:
        merge.merge_partials(work.acc, work.ml, work.out, work.lse, scratch)

    return {"window": at_window, "low-bit pass": lambda: scan(beta), "low-bit pass, all scores": lambda: scan(float("inf")),
            "cut": select, "gather": attend, "merge": together}  # fmt: skip


def _coarse_stages(
    work: CoarseWorkspace, layer: Layer, q: Tensor, total: Tensor, low: Tensor, scaling: float, beta: float
) -> dict[str, Callable[[], None]]:
    """The same of a step over blocks."""
    layout, summaries, k, v = work.layout, layer.records[work.layout], layer.new_k, layer.new_v
    block, bounds, means, after = (
        layout.tokens,
        layout.strategy == "bounds",
        layout.values,
        work.window_parts + work.parts,
    )
    scratch = torch.empty_like(work.best)

    def at_window() -> None:
        window.window_attention(q, k, v, layer.window_k, layer.window_v, layer.store, total, low, work.best, work.acc,
                                work.ml, 0, INIT, scaling)  # fmt: skip
        summarise.extend_blocks(layer.window_k, layer.window_v, summaries, total, low, INIT, LOCAL, block, layout.strategy,
                                layout.count, means)  # fmt: skip

    def scan() -> None:
        block_scores.block_scores(summaries, q, low, work.blocks, work.best, work.group_max, work.scores, work.acc, work.ml,
                                  work.window_parts, work.programs, scaling, block, bounds, means)  # fmt: skip

    def select() -> None:
        cut.cut(work.group_max, work.scores, work.best, work.ml, work.blocks, work.ids, work.counts, work.thresholds,
                work.limits, work.chosen, work.window_parts, work.parts, scaling, beta, 1.0)  # fmt: skip

    def attend() -> None:
        gather_blocks.gather_blocks(layer.store, q, work.ids, work.counts, work.thresholds, work.limits, work.scores,
                                    summaries, low, work.acc, work.ml, work.fetched, after, scaling, block, True,
                                    means)  # fmt: skip

    def together() -> None:
        merge.merge_partials(work.acc, work.ml, work.out, work.lse, scratch)

    return {"window": at_window, "low-bit pass": scan, "cut": select, "gather": attend, "merge": together}


def _error(work: Workspace | CoarseWorkspace, layer: Layer, q: Tensor, out: Tensor, scaling: float) -> float:
    """Relative error of a step's output against dense attention in float32."""
    kv_heads, group = work.kv_heads, work.group
    truth = []
    for h in range(kv_heads):
        s = q.view(kv_heads, group, -1)[h].float() @ layer.keys[0, h].float().T
        s_new = q.view(kv_heads, group, -1)[h].float() @ layer.keys[0, h, 0].float()
        p = torch.softmax(torch.cat([s, s_new[:, None]], 1) * scaling, -1)
        truth.append(p[:, :-1] @ layer.values[0, h].float() + p[:, -1:] * layer.values[0, h, 0].float())
    exact = torch.stack(truth).flatten(0, 1)
    return float((out[0].float() - exact).norm() / exact.norm())


def measure(
    systems: list[System], shape: tuple[int, int, int], tokens: int, layers: int, pool: Tensor, inside: float, bus: float,
    critical: int = 128, queries: int = 4, dtype: torch.dtype = torch.bfloat16,
) -> list[dict[str, Any]]:  # fmt: skip
    """All systems over one context length.

    Parameters
    ----------
    shape : (kv_heads, group, head_dim)
    layers : int
        Different layers that take turns, so that nothing stays in the L2 cache from one step to the next.
    pool : Tensor
        Pinned host memory, flat, at least ``layers`` stores.
    inside, bus : float
        Measured bandwidths, GB/s.
    """
    kv_heads, group, d = shape
    scaling = d**-0.5
    size = kv_heads * tokens * 2 * d
    made = []
    for i in range(layers):
        host = pool[i * size : (i + 1) * size].view(1, kv_heads, tokens, 2, d)
        made.append(_make_layer(systems, shape, tokens, device_view(host), i, critical, queries, dtype))
    turns = [(layer, layer.queries[i]) for i in range(queries) for layer in made]
    total = torch.tensor([tokens], dtype=torch.int32, device="cuda")
    low = torch.tensor([tokens // TILE * TILE - RING], dtype=torch.int32, device="cuda")

    def dense(layer: Layer, q: Tensor) -> Callable[[], Any]:
        return lambda: torch.nn.functional.scaled_dot_product_attention(
            q.unsqueeze(2), layer.keys, layer.values, scale=scaling, enable_gqa=True
        )

    sdpa = timed([dense(*turn) for turn in turns])
    full = 2 * kv_heads * tokens * d * dtype.itemsize
    rows: list[dict[str, Any]] = [
        {
            "tokens": tokens,
            "system": "SDPA, resident",
            "us": sdpa,
            "x SDPA": 1.0,
            "floor us": full / inside / 1e3,
            "bytes share": 1.0,
        },
        {"tokens": tokens, "system": "copy over the bus", "us": full / bus / 1e3, "x SDPA": full / bus / 1e3 / sdpa},
    ]
    for system in systems:
        layout = system.layout(d)
        coarse = isinstance(layout, BlockLayout)
        beta = -math.log(system.alpha) / scaling if system.alpha else float("inf")
        capacity = made[0].records[layout].shape[2] * layout.tokens
        sizes = (1, kv_heads, group, layout, capacity, INIT + RING, system.cap, torch.device("cuda"), dtype)
        kind, run = (CoarseWorkspace, coarse_step) if coarse else (Workspace, decode_step)
        work = kind(*sizes)

        def step(
            layer: Layer, q: Tensor, work: Any = work, run: Callable[..., Tensor] = run, beta: float = beta
        ) -> Callable[[], Tensor]:
            return lambda: run(
                work, q, layer.new_k, layer.new_v, layer.window_k, layer.window_v, layer.store,
                layer.records[work.layout], total, low, INIT, LOCAL, scaling, beta,
            )  # fmt: skip

        whole = timed([step(*turn) for turn in turns])
        errors, counts, fetched = [], [], []
        for layer, q in turns[:2]:
            out = step(layer, q)()
            errors.append(_error(work, layer, q, out, scaling))
            counts.append(work.counts.float().mean().item() * (layout.tokens if coarse else 1))
            fetched.append(work.fetched.sum(-1).float().mean().item())
        one = int(low) * layout.bytes_per_token * kv_heads
        bus_bytes = statistics.mean(fetched) * kv_heads * 2 * d * dtype.itemsize
        row = {
            "tokens": tokens, "system": system.name, "cap": system.cap, "us": whole, "x SDPA": whole / sdpa,
            "x copy": full / bus / 1e3 / whole, "floor us": one / inside / 1e3, "bytes share": one / full,
            "selected": statistics.mean(counts), "fetched": statistics.mean(fetched), "bus us": bus_bytes / bus / 1e3,
            "error": max(errors), "workspace MB": work.nbytes / 1e6,
        }  # fmt: skip
        # Every turn with buffers of its own: a stage finds there what its own step left.
        parts = []
        for layer, q in turns:
            own = kind(*sizes)
            step(layer, q, work=own)()
            parts.append((_coarse_stages if coarse else _stages)(own, layer, q, total, low, scaling, beta))
        for stage in parts[0]:
            row[stage + " us"] = timed([part[stage] for part in parts])
        row["pass GB/s"] = one / row["low-bit pass us"] / 1e3
        rows.append(row)
        del work, own, parts
    return rows


def _print(rows: list[dict[str, Any]]) -> str:
    def text(value: Any) -> str:
        return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)

    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [" | ".join(columns), " | ".join("---" for _ in columns)]
    lines += [" | ".join(text(row.get(column)) for column in columns) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)


def kernel(
    contexts: Annotated[str, typer.Option(help="Context lengths, comma-separated.")] = "131072,524288,1048576",
    systems: Annotated[
        str, typer.Option(help="Systems, comma-separated.")
    ] = "two precisions,block_means,4-bit values,coarse",
    caps: Annotated[
        str, typer.Option(help="Caps to sweep for the first system, comma-separated; empty: none.")
    ] = "8,128,512",
    shape: Annotated[str, typer.Option(help="KV heads, group, head dimension.")] = "8,8,128",
    critical: Annotated[int, typer.Option(help="Critical tokens per query head in the synthetic keys.")] = 128,
    output: Annotated[Path, typer.Option(help="Folder for table and CSV.")] = Path("results/speed-kernel"),
) -> None:
    """One layer's decode step on a CUDA device, stage by stage, against SDPA on resident keys and values."""
    if not torch.cuda.is_available():
        raise typer.BadParameter("expected a CUDA device, found none")
    names = [name.replace("\0", ", ") for name in systems.replace(", ", "\0").split(",") if name]
    unknown = sorted(set(names) - set(SYSTEMS))
    if unknown:
        raise typer.BadParameter(f"unknown systems {unknown}; available: {'; '.join(SYSTEMS)}")
    chosen = [SYSTEMS[name] for name in names]
    chosen += [replace(chosen[0], cap=int(cap)) for cap in caps.split(",") if cap]
    lengths = [int(n) for n in contexts.split(",")]
    kv_heads, group, d = (int(x) for x in shape.split(","))
    per_layer = [kv_heads * n * 2 * d for n in lengths]
    turns = [max(1, min(4, (1 << 20) // n)) for n in lengths]
    pool = pinned_pool().allocate((max(a * b for a, b in zip(per_layer, turns, strict=True)),), torch.bfloat16)
    inside, bus = bandwidths(pool)
    head = (
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Python {platform.python_version()}; "
        f"device copy {inside:.0f} GB/s, bus {bus:.1f} GB/s; {kv_heads * group} query heads, {kv_heads} KV heads, d {d}"
    )
    print(head, flush=True)
    rows: list[dict[str, Any]] = []
    output.mkdir(parents=True, exist_ok=True)
    for n, layers in zip(lengths, turns, strict=True):
        here = measure(chosen, (kv_heads, group, d), n, layers, pool, inside, bus, critical)
        rows += here
        text = f"{head}\n\n{_print(rows)}\n"
        (output / "kernel.md").write_text(text, encoding="utf-8")
        with (output / "kernel.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
            writer.writeheader()
            writer.writerows(rows)
        print(_print(here), flush=True)


if __name__ == "__main__":
    typer.run(kernel)
