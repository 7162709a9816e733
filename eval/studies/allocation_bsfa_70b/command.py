"""``python -m eval study allocation-bsfa-70b``."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import track

from alaya_hf.registry import ALLOCATORS
from eval.environment import describe
from eval.random_model import SHAPES
from eval.studies.allocation_bsfa_70b.measure import PREFILLS, Bench
from eval.studies.allocation_bsfa_70b.page import page
from eval.studies.cells import Cells


def _list(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def allocation_bsfa_70b(
    shape: Annotated[str, typer.Option(help=f"One of {', '.join(SHAPES)}.")] = "llama-3-70b",
    allocators: Annotated[str, typer.Option(help="Comma-separated; default all.")] = "",
    prefills: Annotated[str, typer.Option(help=f"Of {', '.join(PREFILLS)}.")] = ",".join(PREFILLS),
    contexts: Annotated[str, typer.Option(help="Tokens, comma-separated.")] = "32768,65536,131072,262144,524288",
    batches: Annotated[str, typer.Option(help="Rows, comma-separated.")] = "1,2,4,8",
    layers: Annotated[int, typer.Option(help="Layers that are timed, of the shape's identical ones; 0: all.")] = 4,
    chunk: Annotated[int, typer.Option(help="Tokens of a prefill pass.")] = 8192,
    new: Annotated[int, typer.Option(help="Tokens to decode, at least 8.")] = 24,
    k: Annotated[int, typer.Option(help="Tiles that BSFA keeps per block of 128 queries.")] = 64,
    devices: Annotated[int, typer.Option(help="GPUs that the whole shape is planned for.")] = 4,
    device_memory: Annotated[str, typer.Option(help="Of each of them.")] = "75GiB",
    documents: Annotated[int, typer.Option(help="Documents of the allocators' trace.")] = 16,
    device: Annotated[str, typer.Option(help="cuda, or cpu with a small shape.")] = "cuda",
    again: Annotated[bool, typer.Option(help="Measure again what could not be measured.")] = False,
    report: Annotated[
        Path | None,
        typer.Option(help="The page, for example docs/results/allocation-bsfa-70b.md; default: in the folder."),
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for rows and page.")] = Path("results/allocation-bsfa-70b"),
) -> None:
    """Allocation x prefill x context x batch: times and memory; run the same command again to go on after an interruption."""
    names = _list(allocators) or ALLOCATORS.names()
    unknown = [*(set(names) - set(ALLOCATORS.names())), *(set(_list(prefills)) - set(PREFILLS))]
    if unknown or shape not in SHAPES or new < 8:
        raise typer.BadParameter(
            f"unknown {unknown or shape}, or new={new} (at least 8); allocators: {', '.join(ALLOCATORS.names())}; prefills: "
            f"{', '.join(PREFILLS)}; shapes: {', '.join(SHAPES)}"
        )
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise typer.BadParameter("expected a CUDA device, found none; --device cpu --shape tiny runs everywhere")
    cells = Cells(output, again)
    bench = Bench(shape, layers, device, chunk, new, k, output / "thresholds")
    about = {
        "shape": shape,
        "layers": layers,
        "device": describe() if device == "cpu" else torch.cuda.get_device_name(),
    }
    # Not the date, which would make every day's cells others.
    about["device"] = about["device"].split(";")[0]
    room: dict[int | str, str] = {index: device_memory for index in range(devices)}
    work: list[tuple[dict[str, Any], Any]] = []
    for context in (int(part) for part in _list(contexts)):
        for batch in (int(part) for part in _list(batches)):
            place = {"context": context, "batch": batch}
            work.append((
                {"part": "plan", "shape": shape, **place, "devices": devices, "memory": device_memory, "chunk": chunk},
                lambda c=context, b=batch: bench.plan(c, b, room),
            ))  # fmt: skip
            for name in names:
                work.append((
                    {"part": "allocation", "shape": shape, **place, "allocation": name, "documents": documents, "chunk": chunk},
                    lambda c=context, b=batch, n=name: bench.allocation(n, c, b, documents),
                ))  # fmt: skip
            work.append((
                {"part": "decode", **about, **place, "new": new}, lambda c=context, b=batch: bench.decode(c, b)
            ))  # fmt: skip
            for name in _list(prefills):
                settings = {"part": "prefill", **about, **place, "prefill": name, "chunk": chunk}
                settings |= {"k": k} if name == "bsfa" else {}
                work.append((settings, lambda c=context, b=batch, n=name: bench.prefill(n, c, b)))
    with torch.cuda.device(device) if device.startswith("cuda") else nullcontext():
        rows = [cells.measure(settings, run) for settings, run in track(work, "cells")]
    text = page(rows, describe())
    target = report or output / "page.md"
    target.write_text(text, encoding="utf-8")
    typer.echo(f"{target}: {len(rows)} cells, {sum('not run' in row for row in rows)} of them not run")
