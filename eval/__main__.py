"""``python -m eval``: speed, recall and fidelity."""

from __future__ import annotations

import typer

from eval.recall import recall
from eval.speed import app as speed

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Evaluate alaya_hf.")
app.command()(recall)
app.add_typer(speed, name="speed")

if __name__ == "__main__":
    app()
