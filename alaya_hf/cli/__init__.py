"""The command ``alaya-hf``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from alaya_hf import AlayaConfig, __version__
from alaya_hf.cli.db import app as db_app
from alaya_hf.cli.demo import ALL_PRESETS, MAX_NEW_TOKENS, PRESETS, WINDOW, Demo
from alaya_hf.errors import AlayaError, ConfigError

__all__ = ["app"]

app = typer.Typer(
    name="alaya-hf",
    help="Retrieval-based sparse attention over an offloaded KV cache, for Hugging Face Transformers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(db_app, name="db")


def _fail(error: Exception) -> NoReturn:
    # As one line, so that a command in the message can be copied.
    typer.echo(f"Error: {error}", err=True)
    raise typer.Exit(code=2)


def _compact(spec: str | dict[str, object]) -> str:
    """A component and what it does not leave at its default: ``dipr alpha=0.012``."""
    if isinstance(spec, str):
        return spec
    return " ".join([str(spec["kind"]), *(f"{name}={value}" for name, value in spec.items() if name != "kind")])


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"alaya-hf {__version__}")
        raise typer.Exit()


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Retrieval-based sparse attention over an offloaded KV cache, for Hugging Face Transformers."""


@app.command("configs")
def list_configs() -> None:
    """List the presets that AlayaConfig.preset() and `demo --preset` know."""
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for column in ("preset", "query", "index", "residual", "window"):
        table.add_column(column, no_wrap=column in ("preset", "window"), overflow="fold")
    for name in AlayaConfig.presets():
        try:
            config = AlayaConfig.preset(name)
        except ConfigError as error:
            _fail(error)
        window = f"{config.window.init} + {config.window.local}"
        plain = config.to_dict(full=True)
        table.add_row(name, *(_compact(plain[part]) for part in ("query", "index", "residual")), window)
    Console().print(table)


@app.command("demo")
def run_demo(
    model: Annotated[
        str | None,
        typer.Option(help="A causal language model, as a name or a folder. [default: SmolLM2-135M-Instruct from PyPI]"),
    ] = None,
    document: Annotated[
        Path | None, typer.Option(help="A text file. [default: seven licence agreements, 6,450 tokens]")
    ] = None,
    question: Annotated[
        list[str] | None,
        typer.Option(help="A question; repeat for more. [default: ten with known answers]"),
    ] = None,
    preset: Annotated[
        list[str] | None, typer.Option(help=f"A system to run; repeat for more. [default: {', '.join(PRESETS)}]")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Every preset; takes about ten minutes on two cores.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = MAX_NEW_TOKENS,
    window: Annotated[
        tuple[int, int], typer.Option(help="First and most recent tokens that stay on the device.")
    ] = WINDOW,
    device: Annotated[str, typer.Option(help="Where the model runs: auto, cpu, cuda, cuda:1, ...")] = "auto",
    picture: Annotated[Path, typer.Option(help="Where to save the picture of what each layer retrieved.")] = Path(
        "alaya-demo.png"
    ),
) -> None:
    """Ask a long document questions: full attention, retrieval and a window alone, side by side."""
    try:
        Demo(
            model=model,
            document=document,
            questions=question,
            presets=ALL_PRESETS if every else preset,
            max_new_tokens=max_new_tokens,
            window=window,
            device=device,
            picture=picture,
        ).run()
    except AlayaError as error:
        _fail(error)


@app.command("doctor")
def run_doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print plain data instead of a table.")] = False,
) -> None:
    """Print what this machine can do: versions, memory, bandwidths, attention, and GPU kernels checked against their references.

    Leaves with 1 if a check fails.
    """
    from rich.console import Console

    from alaya_hf.cli.doctor import print_report
    from alaya_hf.cli.machine import examine, failures

    report = examine()
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    else:
        print_report(report, Console())
    found = failures(report)
    for failure in found:
        typer.echo(f"Error: {failure}", err=True)
    if found:
        raise typer.Exit(code=1)


_MODEL = Annotated[str | None, typer.Option(help="A model's name or folder; only its configuration is read.")]
_NUMBER = Annotated[int | None, typer.Option(min=1, help="Instead of --model, or in place of its number.")]
_DTYPE = Annotated[str | None, typer.Option(help="Of keys and values: float32, float16, bfloat16.")]
_DEVICE = Annotated[str, typer.Option(help="Where the model is to run: auto, cuda, cpu.")]


@app.command("calibrate")
def run_calibrate(
    model: _MODEL = None,
    layers: _NUMBER = None,
    heads: _NUMBER = None,
    kv_heads: _NUMBER = None,
    head_dim: _NUMBER = None,
    dtype: _DTYPE = None,
    device: _DEVICE = "auto",
    output: Annotated[Path | None, typer.Option(help="File. [default: where the planner looks for it]")] = None,
    quick: Annotated[bool, typer.Option(help="Short contexts and few repetitions: for a look, not for plans.")] = False,
    host: Annotated[bool, typer.Option(help="Measure the host engine, too, where there is a GPU.")] = True,
) -> None:
    """Measure what the stages of a decode step cost on this machine, for the planner. Takes seconds."""
    from rich.console import Console
    from rich.table import Table

    from alaya_hf.cli.calibrate import run
    from alaya_hf.cli.explain import shape_of
    from alaya_hf.planner.candidates import can_drive

    numbers = {"layers": layers or (None if model else 1), "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
    try:
        shape = shape_of(model, numbers, dtype, device)
        made, path = run(shape, output, quick, host)
    except AlayaError as error:
        _fail(error)
    table = Table()
    for column in ("whole step", "tokens", "predicted ms", "measured ms", "error %"):
        table.add_column(column, justify="left" if column == "whole step" else "right")
    for row in made.report:
        predicted, measured = row["predicted"], row["measured"]
        off = 100 * abs(predicted - measured) / measured
        table.add_row(row["plan"], str(row["context"]), f"{1e3 * predicted:.3g}", f"{1e3 * measured:.3g}", f"{off:.0f}")
    Console().print(table)
    if shape.device == "cuda" and not made.device:
        typer.echo(f"the device engine was not measured: {can_drive(shape)}")
    typer.echo(f"median error {100 * (made.median_error or 0):.0f} %; {path}")


@app.command("explain")
def run_explain(
    model: _MODEL = None,
    context: Annotated[int, typer.Option(min=1, help="Tokens.")] = 131072,
    batch: Annotated[int, typer.Option(min=1, help="Rows.")] = 1,
    slo: Annotated[str | None, typer.Option(help="Time per token: '50ms/token', '20 tokens/s'.")] = None,
    gpu_memory: Annotated[str | None, typer.Option(help="Device memory of the cache: '2GiB'.")] = None,
    recovery: Annotated[float | None, typer.Option(help="Share of the attention mass to attend exactly.")] = None,
    kl: Annotated[float | None, typer.Option(help="KL from full attention, nats per token.")] = None,
    planner: Annotated[str, typer.Option(help="cost or paper.")] = "cost",
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="A setting of your own, as query.alpha=0.01; repeat for more.")
    ] = None,
    layers: _NUMBER = None,
    heads: _NUMBER = None,
    kv_heads: _NUMBER = None,
    head_dim: _NUMBER = None,
    parameters: _NUMBER = None,
    dtype: _DTYPE = None,
    device: _DEVICE = "auto",
    calibration: Annotated[str | None, typer.Option(help="File of measured costs. [default: this machine's]")] = None,
    profile: Annotated[str | None, typer.Option(help="Name of a profiled model. [default: the model's]")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print plain data instead of a table.")] = False,
) -> None:
    """Say what the planner would do with a context of a model, and what that would take. Loads no weights."""
    import yaml

    from alaya_hf.cli.explain import explain, shape_of

    numbers = {"layers": layers, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "parameters": parameters}
    try:
        wanted = AlayaConfig(planner=planner)
        changes = {"slo": slo, "gpu_memory": gpu_memory, "recovery": recovery, "kl": kl}
        wanted = wanted.replace(**{name: value for name, value in changes.items() if value is not None})
        for text in settings or []:
            name, found, value = text.partition("=")
            if not found:
                raise ConfigError(f"--set takes name=value, but got {text!r}.")
            wanted = wanted.override({name: yaml.safe_load(value)})
        result = explain(shape_of(model, numbers, dtype, device), wanted, context, batch, calibration, profile)
    except AlayaError as error:
        _fail(error)
    typer.echo(result.json() if as_json else str(result))
