"""``python -m eval``: speed, recall, fidelity, sparse prefill, legal tasks, ablations, studies and reports."""

from __future__ import annotations

import typer

from eval.ablate import ablate
from eval.calibrate_bsfa import calibrate_bsfa
from eval.draw import app as plot
from eval.faults import faults
from eval.fidelity_command import fidelity
from eval.legal_command import legal
from eval.planner_command import planner
from eval.profile import profile
from eval.recall import recall
from eval.reporting.command import report
from eval.sparse_prefill import sparse_prefill
from eval.speed import app as speed
from eval.studies import app as study

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Evaluate alaya_hf.")
app.command()(legal)
app.command()(ablate)
app.command()(report)
app.command()(recall)
app.command()(profile)
app.command()(planner)
app.command()(faults)
app.command()(fidelity)
app.command()(calibrate_bsfa)
app.command()(sparse_prefill)
app.add_typer(speed, name="speed")
app.add_typer(study, name="study")
app.add_typer(plot, name="plot")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True}, add_help_option=False)
def harness(context: typer.Context) -> None:
    """lm-evaluation-harness's own command line, with the model 'alaya' registered."""
    from eval.harness import main

    main(context.args)


if __name__ == "__main__":
    app()
