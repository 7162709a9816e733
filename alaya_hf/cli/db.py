"""``alaya-hf db``: store documents once, ask them many times."""

from __future__ import annotations

import datetime
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from alaya_hf.cache_argument import cache_argument
from alaya_hf.config import AlayaConfig
from alaya_hf.db import AlayaDB
from alaya_hf.errors import AlayaError, StoreError, UnknownContextError

app = typer.Typer(
    no_args_is_help=True, help="Contexts that outlive the process: store a document once, ask it many times."
)

CHUNK = 2048
"""Tokens of a document run at a time; the progress bar moves as often."""

Store = Annotated[Path, typer.Option("--db", help="Folder of the store.", envvar="ALAYA_DB")]
Namespace = Annotated[str, typer.Option(help="Tenant; contexts of others are invisible.")]
Model = Annotated[
    str,
    typer.Option(help="A causal language model, as a name or a folder; 'smollm2': SmolLM2-135M-Instruct from PyPI."),
]
Preset = Annotated[str, typer.Option(help="A preset, or a YAML file of an AlayaConfig.")]
Device = Annotated[str, typer.Option(help="Where the model runs: auto, cpu, cuda, cuda:1, ...")]

Remote = Annotated[str | None, typer.Option(help="A store to share with other machines, a URL of fsspec.")]

STORE = Path("contexts")


@contextmanager
def _errors() -> Iterator[None]:
    try:
        yield
    except AlayaError as error:
        # As one line, so that a command in the message can be copied.
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(code=2) from error


@contextmanager
def _bar(what: str) -> Iterator[Callable[[int, int], None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # On the error stream, so that answers and tables can be piped.
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def _settings(preset: str) -> AlayaConfig:
    path = Path(preset)
    return AlayaConfig.from_yaml(path) if path.suffix in (".yaml", ".yml") else AlayaConfig.preset(preset)


def _load(name: str, device: str) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    with Console(stderr=True).status(f"loading {name}"):
        if name == "smollm2":
            from alaya_hf.cli.smollm2 import load_smollm2

            model, tokenizer = load_smollm2()
            return model.to(device), tokenizer
        try:
            model = AutoModelForCausalLM.from_pretrained(name, dtype="auto" if device != "cpu" else torch.float32)
            return model.to(device).eval(), AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise StoreError(f"the model {name!r} cannot be loaded: {error}") from error


def _document(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise StoreError(f"{path} cannot be read as UTF-8 text: {error}") from error


def _ids(tokenizer: Any, text: str) -> Any:
    import torch

    return torch.tensor([tokenizer(text)["input_ids"]])


def _put(db: AlayaDB, ids: Any, name: str | None) -> tuple[Any, Any]:
    """Run what is not stored of a document and store it; the session and the context."""
    import torch

    session, rest = db.create_session(ids)
    with _bar("reading the document") as moved, torch.no_grad():
        moved(session.reused, ids.shape[1])
        for start in range(session.reused, ids.shape[1], CHUNK):
            part = ids[:, start : start + CHUNK].to(db.model.device)
            db.model(input_ids=part, **cache_argument(session), logits_to_keep=1)
            moved(start + part.shape[1], ids.shape[1])
    session.note_tokens(ids)
    with _bar("storing layers") as moved:
        row = db.store(session, name=name, progress=moved)
    return session, row


@app.command("put")
def put(
    file: Annotated[Path, typer.Argument(help="A text file.")],
    model: Model = "smollm2",
    name: Annotated[str | None, typer.Option(help="Name of the context. [default: the file's]")] = None,
    db: Store = STORE,
    namespace: Namespace = "default",
    preset: Preset = "alaya",
    device: Device = "auto",
    remote: Remote = None,
) -> None:
    """Read a document with a model and store its keys and values."""
    with _errors():
        text = _document(file)
        network, tokenizer = _load(model, device)
        with AlayaDB(
            db, model=network, tokenizer=tokenizer, namespace=namespace, settings=_settings(preset), remote=remote
        ) as store:
            session, row = _put(store, _ids(tokenizer, text), name or file.name)
        typer.echo(f"{row.name}: {row.tokens:,} tokens, {row.bytes:,} bytes ({row.id[:8]})")


@app.command("ask")
def ask(
    context: Annotated[str, typer.Argument(help="A text file, or the name or id of a stored context.")],
    question: Annotated[str, typer.Argument(help="A question about it.")],
    model: Model = "smollm2",
    prefix: Annotated[str, typer.Option(help="Beginning of the answer, for small models.")] = "",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 64,
    db: Store = STORE,
    namespace: Namespace = "default",
    preset: Preset = "alaya",
    device: Device = "auto",
    remote: Remote = None,
) -> None:
    """Ask a document; a file that is not stored yet is read and stored first. The answer comes as it is generated."""
    import time

    import torch
    from transformers import TextIteratorStreamer

    with _errors():
        network, tokenizer = _load(model, device)
        with AlayaDB(
            db, model=network, tokenizer=tokenizer, namespace=namespace, settings=_settings(preset), remote=remote
        ) as store:
            path = Path(context)
            if path.is_file():
                ids = _ids(tokenizer, _document(path))
                began = time.perf_counter()
                session, rest = store.create_session(ids)
                if rest.shape[1]:
                    session, _ = _put(store, ids, path.name)
                    began = time.perf_counter()
            else:
                began = time.perf_counter()
                try:
                    session, _ = store.create_session(context=context)
                except UnknownContextError as error:
                    raise StoreError(f"{context!r} is neither a file nor a stored context: {error}") from error
            text = f"\n\nQuestion: {question}\nAnswer: {prefix}".rstrip()
            asked = tokenizer(text, add_special_tokens=False)["input_ids"]
            prompt = torch.cat([session.token_ids, torch.tensor([asked])], dim=1).to(network.device)
            streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
            failed: list[BaseException] = []

            def generate() -> None:
                try:
                    network.generate(
                        prompt,
                        attention_mask=torch.ones_like(prompt),
                        **cache_argument(session),
                        max_new_tokens=max_new_tokens,
                        do_sample=False,
                        streamer=streamer,
                    )
                except BaseException as error:
                    failed.append(error)
                    streamer.end()

            first = 0.0
            thread = threading.Thread(target=generate)
            thread.start()
            for piece in streamer:
                first = first or time.perf_counter() - began
                typer.echo(piece, nl=False)
            thread.join()
            typer.echo()
            if failed:
                raise failed[0]
        typer.echo(
            f"first words after {first:.2f} s, {session.reused:,} of {prompt.shape[1]:,} tokens from the store",
            err=True,
        )


@app.command("ls")
def ls(db: Store = STORE, namespace: Namespace = "default") -> None:
    """List the stored contexts, most recently used first."""
    with _errors(), AlayaDB(db, namespace=namespace, read_only=True) as store:
        table = Table()
        for column in ("name", "id", "tokens", "size", "its own", "dtype", "used"):
            table.add_column(column, justify="right" if column in ("tokens", "size", "its own") else "left")
        for row in store.list():
            used = datetime.datetime.fromtimestamp(row.used).isoformat(" ", "minutes")
            own, total = f"{row.own_bytes / 1e6:,.1f} MB", f"{row.bytes / 1e6:,.1f} MB"
            table.add_row(row.name or "", row.id[:8], f"{row.tokens:,}", total, own, row.dtype, used)
        Console().print(table)


@app.command("info")
def info(
    context: Annotated[str, typer.Argument(help="Name or id of a context.")],
    db: Store = STORE,
    namespace: Namespace = "default",
) -> None:
    """Say everything about one context."""
    with _errors(), AlayaDB(db, namespace=namespace, read_only=True) as store:
        row = store.info(context)
        table = Table(show_header=False)
        for key in ("name", "id", "namespace", "tokens", "layers", "dtype", "bytes", "own_bytes"):
            table.add_row(key, str(getattr(row, key)))
        for key in ("created", "used"):
            table.add_row(key, datetime.datetime.fromtimestamp(getattr(row, key)).isoformat(" ", "seconds"))
        for key, value in row.model.items():
            table.add_row(f"model: {key}", value)
        Console().print(table)


@app.command("rm")
def remove(
    context: Annotated[str, typer.Argument(help="Name or id of a context.")],
    db: Store = STORE,
    namespace: Namespace = "default",
) -> None:
    """Delete a context; what others share with it stays."""
    with _errors(), AlayaDB(db, namespace=namespace) as store:
        store.delete(context)


@app.command("verify")
def verify(
    context: Annotated[str | None, typer.Argument(help="Name or id of a context. [default: all]")] = None,
    db: Store = STORE,
    namespace: Namespace = "default",
) -> None:
    """Read everything and compare it with its checksums."""
    with _errors(), AlayaDB(db, namespace=namespace, read_only=True) as store:
        with _bar("verifying segments") as moved:
            report = store.verify(context, progress=moved)
        for problem in report.problems:
            typer.echo(problem)
        typer.echo(f"{report.segments} segments, {report.nbytes:,} bytes, {len(report.problems)} problems")
        if report.problems:
            raise typer.Exit(code=1)


@app.command("gc")
def gc(
    max_bytes: Annotated[
        int | None, typer.Option(help="Remove least recently used contexts until the namespace takes no more.")
    ] = None,
    db: Store = STORE,
    namespace: Namespace = "default",
) -> None:
    """Remove what interrupted writes left, and contexts above a limit."""
    with _errors(), AlayaDB(db, namespace=namespace) as store:
        report = store.gc(max_bytes)
        for name in report.contexts:
            typer.echo(f"removed {name}")
        typer.echo(f"{report.leftovers} leftovers removed; {report.nbytes:,} bytes stored")
        if not report.swept:
            typer.echo("another process is writing, so leftovers were not looked for; try again later")
