"""``python -m eval plot``: plots of results that are at hand, without measuring anything."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from eval import plots
from eval.report import read_csv

app = typer.Typer(no_args_is_help=True, help="Plots of results at hand.")


@app.callback()
def _plot() -> None:
    """Plots of results at hand."""


@app.command()
def prefill(
    folder: Annotated[Path, typer.Argument(help="With model.csv and layer.csv.")] = Path("docs/results/prefill"),
) -> None:
    """Time to first token, peak memory and one layer's attention, from a folder's CSVs to its prefill.png."""
    model, layer = folder / "model.csv", folder / "layer.csv"
    missing = [str(path) for path in (model, layer) if not path.exists()]
    if missing:
        raise typer.BadParameter(
            f"no {' and no '.join(missing)}; `python -m eval speed prefill` and `speed sparse-prefill` make them"
        )
    target = folder / "prefill.png"
    plots.prefill(read_csv(model), read_csv(layer), target)
    typer.echo(target)
