"""``python -m eval study allocation-bsfa-70b``."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import torch
import typer

from alaya_hf.registry import ALLOCATORS
from alaya_hf.storage.memory import available_host_memory
from eval.environment import describe
from eval.random_model import SHAPES
from eval.studies.allocation_bsfa_70b.grid import PARTS, Grid, grid
from eval.studies.allocation_bsfa_70b.measure import BASELINES, PREFILLS, Bench, _bytes
from eval.studies.allocation_bsfa_70b.page import page
from eval.studies.cells import Cells

_QUALITY = Path("docs/results/legal-smollm2/tables")


def _list(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def allocation_bsfa_70b(
    shape: Annotated[str, typer.Option(help=f"One of {', '.join(SHAPES)}.")] = "llama-3-70b",
    parts: Annotated[str, typer.Option(help="Comma-separated; plan and allocation need no GPU.")] = ",".join(PARTS),
    allocators: Annotated[str, typer.Option(help="Comma-separated; default all.")] = "",
    prefills: Annotated[str, typer.Option(help=f"Of {', '.join(PREFILLS)}.")] = "dense,bsfa",
    baselines: Annotated[str, typer.Option(help=f"Of {', '.join(BASELINES)}.")] = "resident,full,offloaded",
    contexts: Annotated[
        str, typer.Option(help="Tokens, comma-separated, the most worthwhile first.")
    ] = "131072,524288",
    batches: Annotated[
        str, typer.Option(help="Rows, comma-separated; 'largest': as many as fit on the machine planned for.")
    ] = "1,largest",
    layers: Annotated[int, typer.Option(help="Layers that the model has, of the shape's identical ones; 0: all.")] = 4,
    few: Annotated[
        int, typer.Option(help="Layers that run where all of them would take long: see eval/README.md.")
    ] = 4,
    shared_weights: Annotated[
        bool, typer.Option(help="All layers have one layer's weights, for a device that cannot hold them all.")
    ] = False,
    chunk: Annotated[int, typer.Option(help="Tokens of a prefill pass, all rows together.")] = 16384,
    new: Annotated[int, typer.Option(help="Tokens to decode, at least 8.")] = 24,
    k: Annotated[int, typer.Option(help="Tiles that BSFA keeps per block of 128 queries.")] = 64,
    devices: Annotated[int, typer.Option(help="GPUs that the whole shape is planned for.")] = 4,
    device_memory: Annotated[str, typer.Option(help="Of each of them.")] = "75GiB",
    host_memory: Annotated[str, typer.Option(help="For offloaded contexts, of the machine planned for.")] = "480GiB",
    documents: Annotated[int, typer.Option(help="Documents of the allocators' trace.")] = 16,
    device: Annotated[str, typer.Option(help="cuda, or cpu with a small shape.")] = "cuda",
    seconds: Annotated[float, typer.Option(help="No cell is begun after so many; 0: no limit.")] = 0,
    again: Annotated[bool, typer.Option(help="Measure again what could not be measured.")] = False,
    report: Annotated[
        Path | None,
        typer.Option(help="The page, for example docs/results/allocation-bsfa-70b.md; default: in the folder."),
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for rows, table and page.")] = Path(
        "results/allocation-bsfa-70b"
    ),
) -> None:
    """Allocation x prefill x context x batch: times and memory; run the same command again to go on after an interruption."""
    names = _list(allocators) or ALLOCATORS.names()
    unknown = [
        *(set(names) - set(ALLOCATORS.names())), *(set(_list(prefills)) - set(PREFILLS)),
        *(set(_list(baselines)) - set(BASELINES)), *(set(_list(parts)) - set(PARTS)),
    ]  # fmt: skip
    if unknown or shape not in SHAPES or new < 8:
        raise typer.BadParameter(
            f"unknown {', '.join(unknown) or shape}, or new={new} (at least 8); allocators: {', '.join(ALLOCATORS.names())}; "
            f"prefills: {', '.join(PREFILLS)}; baselines: {', '.join(BASELINES)}; parts: {', '.join(PARTS)}; shapes: "
            f"{', '.join(SHAPES)}"
        )
    cuda, timed = device.startswith("cuda"), bool({"decode", "prefill"} & set(_list(parts)))
    if timed and cuda and not torch.cuda.is_available():
        raise typer.BadParameter(
            "expected a CUDA device, found none; --parts plan,allocation needs none, --device cpu --shape tiny runs everywhere"
        )
    # From here on: what the interpreter took to begin is not ours to count.
    cells = Cells(output, again, seconds)
    here = int(0.85 * available_host_memory())
    bench = Bench(
        shape, layers, device, chunk, new, k, output / "thresholds", {index: device_memory for index in range(devices)},
        _bytes(host_memory), here, shared_weights,
    )  # fmt: skip
    # Not the date, which would make every day's cells others.
    named = torch.cuda.get_device_name() if cuda and timed else describe().split(";")[0]
    asked = Grid(
        # Only the device engine's store is handed out by an allocator: its times depend on it.
        _list(parts), names, cuda, _list(prefills), _list(baselines), [int(part) for part in _list(contexts)],
        [None if part == "largest" else int(part) for part in _list(batches)], min(few, bench.held), documents, named,
        {"devices": devices, "memory": device_memory, "host": host_memory},
    )  # fmt: skip
    target = report or output / "page.md"
    quality = _QUALITY if _QUALITY.is_dir() else None
    place, done, missed = None, 0, 0
    with torch.cuda.device(device) if cuda and timed else nullcontext():
        for cell in grid(bench, asked):
            if place not in (None, cell.place):
                bench.give_back()  # buffers of other sizes
            place = cell.place
            row = cells.measure(cell.settings, cell.run, cell.expected(cells.rows()))
            done, missed = done + 1, missed + ("not run" in row)
            took = row["not run"] if "not run" in row else f"{row['seconds']:.1f} s"
            typer.echo(f"{cell.name}: {took}", err=True)
            cells.write_csv(output / "cells.csv")
            target.write_text(page(cells.rows(), quality), encoding="utf-8")
    typer.echo(f"{target}: {done} cells, {missed} of them not run")
