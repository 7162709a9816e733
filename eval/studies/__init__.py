"""Studies: grids of settings in one resumable command each, and the pages that report them."""

from __future__ import annotations

import typer

from eval.studies.allocation_bsfa_70b.command import allocation_bsfa_70b

app = typer.Typer(no_args_is_help=True, help="Grids of settings, each in one resumable command.")


@app.callback()
def _studies() -> None:
    """Grids of settings, each in one resumable command."""


app.command("allocation-bsfa-70b")(allocation_bsfa_70b)
