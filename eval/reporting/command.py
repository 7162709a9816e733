"""``python -m eval report``: a results folder as a page, Markdown, plots and tables."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from eval.report import write_csv
from eval.reporting import figures
from eval.reporting.ablation import ablation_figures, ablation_table
from eval.reporting.drawing import Plot
from eval.reporting.load import Results, ResultsError, load
from eval.reporting.losses import losses
from eval.reporting.measures import Measure, headline
from eval.reporting.page import Tables, html, markdown_page, sections, slug, summary
from eval.reporting.systems import FULL
from eval.reporting.tables import (
    absent_table,
    cost_table,
    fidelity_table,
    headline_table,
    overall_table,
    retrieval_table,
)


def write(results_dir: Path, output: Path | None = None) -> Path:
    """Write ``report.html``, ``report.md``, ``plots/*.svg`` and ``tables/*.csv``.

    Parameters
    ----------
    results_dir : Path
        Folder with ``rows.jsonl``, ``skipped.jsonl`` and ``run.json``.
    output : Path, optional
        Folder to write to; ``results_dir`` by default.

    Returns
    -------
    Path
        The page.

    Raises
    ------
    ResultsError
        If the folder cannot be read.
    """
    results = load(results_dir)
    metrics, notes = headline([*results.rows, *results.ablation])
    results.notes.extend(notes)
    reference = [row for row in results.rows if row.system == FULL]
    tables = Tables(
        headline=headline_table(results, metrics),
        overall=overall_table(results, metrics),
        fidelity=fidelity_table(results),
        retrieval=retrieval_table(results),
        cost=cost_table(results),
        losses=losses(results, metrics),
        absent=absent_table(results),
        ablation=ablation_table(results.ablation, reference, metrics),
    )
    plots = {"figures": _figures(results, metrics), "ablation": ablation_figures(results.ablation)}
    output = Path(results_dir) if output is None else Path(output)
    output.mkdir(parents=True, exist_ok=True)
    _write_tables(output / "tables", tables)
    _write_plots(output / "plots", [plot for group in plots.values() for plot in group])
    found, tiles = sections(results, metrics, tables, plots), summary(results, tables)
    (output / "report.md").write_text(markdown_page(results, found, tiles), encoding="utf-8")
    page = output / "report.html"
    page.write_text(html(results, found, tiles), encoding="utf-8")
    return page


def report(
    results: Annotated[Path, typer.Argument(help="Folder with rows.jsonl, skipped.jsonl and run.json.")],
    output: Annotated[Path | None, typer.Option(help="Where to write; the results folder by default.")] = None,
) -> None:
    """Report a results folder: report.html (one file, no network), report.md, plots/ and tables/."""
    try:
        page = write(results, output)
    except ResultsError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from error
    typer.echo(f"{page}, report.md, plots/ and tables/ beside it.")


def _figures(results: Results, metrics: dict[str, Measure]) -> list[Plot]:
    with_metrics: list[Callable[..., Plot | None]] = [
        figures.quality_against_attended,
        figures.quality_against_bytes,
        figures.quality_against_time,
    ]
    found: list[Any] = [draw(results, metrics) for draw in with_metrics]
    found += [figures.evidence_against_attended(results), figures.kl_against_attended(results)]
    found += figures.needle_depth(results, metrics)
    found += [figures.retrieved_by_layer(results), figures.evidence_by_layer(results)]
    found += [figures.quality_by_task(results, metrics)]
    return [plot for plot in found if plot is not None]


def _write_tables(folder: Path, tables: Tables) -> None:
    folder.mkdir(exist_ok=True)
    for name, table in vars(tables).items():
        path = folder / f"{name}.csv"
        rows = table.table if name == "losses" else table
        if rows:
            write_csv(path, rows)
        elif path.exists():
            # Of an earlier report on fewer or other rows.
            path.unlink()


def _write_plots(folder: Path, plots: list[Plot]) -> None:
    folder.mkdir(exist_ok=True)
    names = {f"{slug(panel.name)}.svg": panel for plot in plots for panel in plot.panels}
    for path in folder.glob("*.svg"):
        if path.name not in names:
            path.unlink()
    for name, panel in names.items():
        (folder / name).write_bytes(panel.image)
