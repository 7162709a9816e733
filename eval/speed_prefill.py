"""``python -m eval speed prefill``: time to first token of a whole model, offloading as it goes, against DynamicCache."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import DynamicCache

from alaya_hf import AlayaCache, AlayaConfig
from alaya_hf.cache_argument import cache_argument
from alaya_hf.engine.device.stream import copy_waits
from alaya_hf.errors import HostMemoryError
from alaya_hf.kernels.sparse_prefill import Q_TILE
from eval.calibrate_bsfa import calibrate
from eval.environment import describe
from eval.random_model import SHAPES, random_model
from eval.report import markdown, write_csv
from eval.speed_model import DEVICE

FULL = "full"
SYSTEMS = (FULL, "alaya", "blasst", "bsfa", "retrieval")
SLACK = 6e9
"""Bytes that a prefill may take besides the weights and the low-bit copy."""
_CALIBRATED = 8192  # tokens of the random text that BSFA's thresholds are made from
_COLUMNS = (
    "tokens", "system", "chunk", "s", "first s", "s, all layers", "tokens/s", "x full", "peak GB", "reserved GB", "weights GB",
    "low-bit GB", "bound GB", "within", "skipped", "copy stalls", "not run",
)  # fmt: skip


def prefill_once(model: Any, cache: Any, ids: torch.Tensor, chunk: int) -> float:
    """Seconds until the next token's logits are there; of a cache that knows how many tokens will come, as in ``generate``."""
    cuda = ids.is_cuda
    if cuda:
        torch.cuda.synchronize()
    began = time.perf_counter()
    with torch.no_grad():
        for start in range(0, ids.shape[1], chunk):
            model(
                input_ids=ids[:, start : start + chunk], **cache_argument(cache), logits_to_keep=1
            ).logits.argmax().item()
    return time.perf_counter() - began


def weight_bytes(model: Any, layers: int) -> int:
    """Bytes of the weights if the model had so many layers."""
    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    one = sum(p.numel() * p.element_size() for p in model.model.layers[0].parameters())
    return whole + (layers - len(model.model.layers)) * one


def full_bytes(model: Any, layers: int, tokens: int) -> int:
    """About what DynamicCache needs for a prompt in one pass, had the model so many layers: weights, cache, and the MLP's and
    attention's widest intermediate results."""
    config, size = model.config, next(model.parameters()).element_size()
    cached = 2 * layers * config.num_key_value_heads * config.head_dim * tokens * size
    work = tokens * (3 * config.intermediate_size + 4 * config.hidden_size) * size
    return weight_bytes(model, layers) + cached + work


def thresholds_file(model: Any, k: int, tokens: int, folder: Path) -> Path:
    """BSFA's thresholds for this model, whose weights nobody else has: calibrated on random ids, the last block's for all that
    follow."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, model.config.vocab_size, (min(tokens, _CALIBRATED),), generator=generator).tolist()
    found = calibrate(model, [ids], [k], "random weights")[k]
    missing = max(0, -(-tokens // Q_TILE) - found.table.shape[2])
    found = replace(found, table=torch.cat([found.table, found.table[..., -1:].expand(-1, -1, missing)], dim=2))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"thresholds-k{k}.safetensors"
    found.save(path)
    return path


def settings_of(
    systems: Sequence[str], model: Any, cuda: bool, lam: float, k: int, tokens: int, output: Path
) -> dict[str, AlayaConfig]:
    """Configurations of the systems that offload."""
    base = DEVICE if cuda else DEVICE.replace(engine="host")
    made = {"alaya": base, "blasst": base.replace(prefill={"kind": "blasst", "lam": lam})}
    if "bsfa" in systems:
        made["bsfa"] = base.replace(
            prefill={"kind": "bsfa", "thresholds": str(thresholds_file(model, k, tokens, output))}
        )
    made["retrieval"] = base.replace(engine="host", prefill="retrieval")
    return {name: made[name] for name in systems if name != FULL}


def new_cache(name: str, model: Any, settings: dict[str, AlayaConfig]) -> Any:
    """An empty cache of a system."""
    if name == FULL:
        return DynamicCache(config=model.config)
    # Only a probe says how many tiles were skipped; it waits for the device once a layer and chunk.
    return AlayaCache(settings[name], config=model.config, probe=name in ("blasst", "bsfa"))


def measure(
    name: str, model: Any, settings: dict[str, AlayaConfig], ids: torch.Tensor, chunk: int, repeats: int, layers: int
) -> dict[str, Any]:
    """A row: one system and prompt.

    Parameters
    ----------
    layers : int
        Of the whole model, of which this one may have some.
    """
    cuda, tokens = ids.is_cuda, ids.shape[1]
    row: dict[str, Any] = {"tokens": tokens, "system": name, "chunk": chunk or tokens}
    if name == FULL and cuda:
        needed, there = full_bytes(model, layers, tokens), torch.cuda.get_device_properties(ids.device).total_memory
        if needed > there:
            return row | {
                "not run": f"out of memory: all {layers} layers need about {needed / 1e9:.0f} GB of {there / 1e9:.0f}"
            }
    times, stalls = [], []
    try:
        for _ in range(repeats):
            gc.collect()
            if cuda:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            cache = new_cache(name, model, settings)
            if name != FULL:
                cache.reserve(tokens)
            with copy_waits() as waits:
                times.append(prefill_once(model, cache, ids, chunk or tokens))
            stalls.append(waits.seconds() / times[-1] if waits.pairs else 0.0)
            stats = {} if name == FULL else cache.stats()
            del cache
    except (torch.cuda.OutOfMemoryError, HostMemoryError) as error:
        return row | {"not run": f"out of memory: {str(error).splitlines()[0][:120]}"}
    row |= {"s": min(times), "first s": times[0], "tokens/s": tokens / min(times)}
    row["s, all layers"] = min(times) * layers / len(model.model.layers)
    row["skipped"] = stats.get("skipped_tiles")
    if cuda:
        row["peak GB"] = torch.cuda.max_memory_allocated() / 1e9
        row["reserved GB"] = torch.cuda.max_memory_reserved() / 1e9
        row["weights GB"] = weight_bytes(model, len(model.model.layers)) / 1e9
    if cuda and name != FULL:
        driven = settings[name].engine == "device"
        row["low-bit GB"] = stats["lowbit_bytes"] / 1e9 if driven else 0.0
        row["bound GB"] = row["weights GB"] + row["low-bit GB"] + SLACK / 1e9
        row["within"] = "yes" if row["peak GB"] <= row["bound GB"] else "no"
        row["copy stalls"] = stalls[times.index(min(times))] if driven else None
    return row


def prefill(
    shape: Annotated[str, typer.Option(help=f"One of {', '.join(SHAPES)}.")] = "llama-3-8b",
    contexts: Annotated[
        str, typer.Option(help="Context lengths, comma-separated, for example 524288.")
    ] = "32768,131072",
    systems: Annotated[str, typer.Option(help=f"Of {', '.join(SYSTEMS)}, comma-separated.")] = "full,alaya,blasst,bsfa",
    chunks: Annotated[
        str, typer.Option(help="Chunk sizes for the systems that offload, comma-separated; 0: all in one pass.")
    ] = "16384",
    layers: Annotated[
        int, typer.Option(help="Only so many of the model's layers; 0: all. Times for all of them are extrapolated.")
    ] = 0,
    repeats: Annotated[
        int, typer.Option(help="Passes per system, the fastest counts; the first one makes host memory.")
    ] = 2,
    lam: Annotated[float, typer.Option("--lambda", help="BLASST's.")] = 0.01,
    k: Annotated[int, typer.Option(help="BSFA's: tiles to keep per head and 128 queries.")] = 64,
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    output: Annotated[Path, typer.Option(help="Folder for table and CSV.")] = Path("results/speed-prefill"),
) -> None:
    """Time to first token: DynamicCache in one pass against caches that offload as they go, exactly or skipping tiles."""
    cuda = device.startswith("cuda")
    if cuda and not torch.cuda.is_available():
        raise typer.BadParameter("expected a CUDA device, found none")
    names = [name.strip() for name in systems.split(",") if name.strip()]
    unknown = sorted(set(names) - set(SYSTEMS))
    if unknown or shape not in SHAPES:
        raise typer.BadParameter(
            f"unknown {unknown or shape}; systems: {', '.join(SYSTEMS)}; shapes: {', '.join(SHAPES)}"
        )
    lengths = [int(n) for n in contexts.split(",")]
    rows: list[dict[str, Any]] = []
    text = ""
    with torch.cuda.device(device) if cuda else nullcontext():
        model = random_model(shape, device, torch.bfloat16 if cuda else torch.float32, layers)
        whole = int(SHAPES[shape]["num_hidden_layers"])
        settings = settings_of(names, model, cuda, lam, k, max(lengths), output)
        # Kernels of every kind of block are compiled: whole ones and ragged ones.
        warm = torch.randint(1, model.config.vocab_size, (1, min(5000, *lengths)), device=device)
        for name in names:
            prefill_once(model, new_cache(name, model, settings), warm, 2100)
        for tokens in lengths:
            ids = torch.randint(1, model.config.vocab_size, (1, tokens), device=device)
            for name in names:
                for chunk in [0] if name == FULL else [int(part) for part in chunks.split(",")]:
                    row = measure(name, model, settings, ids, chunk, repeats, whole)
                    base = next((r.get("s") for r in rows if r["tokens"] == tokens and r["system"] == FULL), None)
                    if base and "s" in row:
                        row["x full"] = row["s"] / base
                    rows.append(row)
                    text = _write(rows, shape, layers, output)
                    typer.echo(f"{tokens} tokens, {name}: {row.get('s', row.get('not run'))}", err=True)
    typer.echo(text)


def _write(rows: list[dict[str, Any]], shape: str, layers: int, output: Path) -> str:
    rows = [{column: row.get(column) for column in _COLUMNS} for row in rows]
    output.mkdir(parents=True, exist_ok=True)
    write_csv(output / "prefill.csv", rows)
    text = (
        f"{describe()}; {shape}{f', {layers} layers' if layers else ''}, random weights\n\n{markdown(rows)}\n\n"
        "s, all layers: extrapolated in proportion from the layers there are; embedding and output are counted with every layer. "
        f"Bound: weights, low-bit copy and {SLACK / 1e9:.0f} GB. Peak: memory of living tensors. Copy stalls: share of the time "
        "that the compute stream waited for copies. Random weights attend evenly: blasst skips next to nothing, and what "
        "skipping gains is measured by `speed sparse-prefill`; bsfa's thresholds are calibrated on random ids.\n"
    )
    (output / "prefill.md").write_text(text, encoding="utf-8")
    return text
