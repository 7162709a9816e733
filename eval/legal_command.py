"""``python -m eval legal``: legal tasks, systems, lengths and models."""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from alaya_hf.errors import AlayaError
from eval.environment import hardware, versions
from eval.legal import TASKS, Item, Source, Task, with_chat
from eval.legal.sources import DataError, MissingData
from eval.legal.text import load_tokenizer
from eval.models import ModelEntry, defaults_from_file, load, read_models
from eval.parallel import gather_rows, launched
from eval.random_model import SHAPES
from eval.running.run import Runner
from eval.running.store import Results, ResultsError, config_hash, read
from eval.systems import DEFAULT, PEERS, System, SystemUnavailable


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def commit() -> str:
    """The commit of the working copy, with a mark if files were changed; empty outside a repository."""
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return found.stdout.strip()


def shard_of(text: str) -> tuple[int, int]:
    """``"2/8"`` as (2, 8); without a text, what ``accelerate launch`` says.

    Raises
    ------
    typer.BadParameter
    """
    if not text:
        return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    try:
        rank, count = (int(part) for part in text.split("/"))
    except ValueError:
        rank, count = 0, 0
    if not 0 <= rank < count:
        raise typer.BadParameter(f"--shard takes RANK/COUNT with 0 <= RANK < COUNT, but got {text!r}")
    return rank, count


def take_shard(work: list[tuple[Task, int, list[Item]]], rank: int, count: int) -> list[tuple[Task, int, list[Item]]]:
    """Every ``count``-th document of all tasks and lengths together, beginning with document ``rank``."""
    number, mine = 0, []
    for task, length, items in work:
        documents = {document: number + i for i, document in enumerate(dict.fromkeys(item.document for item in items))}
        number += len(documents)
        mine.append((task, length, [item for item in items if documents[item.document] % count == rank]))
    return mine


def open_results(folder: Path, rank: int, count: int, config: dict[str, Any], seed: int) -> Results:
    """The folder, with what this run is noted in it.

    Raises
    ------
    typer.BadParameter
        If it holds results of another configuration.
    """
    results = Results(folder, rank if count > 1 else None)
    # One entry for all processes of a run.
    command = "python -m eval " + re.sub(r"--shard[ =]\d+/", "--shard RANK/", " ".join(sys.argv[1:]))
    about = {"commit": commit(), "hardware": hardware(), "seed": seed}
    try:
        results.begin({"command": command, "config": config, **versions(), **about})
    except ResultsError as error:
        raise typer.BadParameter(str(error)) from error
    return results


def choose_systems(
    names: list[str], window: tuple[int, int], budget_of: str, device: str
) -> tuple[list[System], list[str], dict[str, str]]:
    """Systems that run in this process, peers that run in their own, and why others do not run.

    Raises
    ------
    ConfigError
        For an unknown name.
    typer.BadParameter
        If the system that sets the budget is not among them.
    """
    systems, peers, skipped = [], [], {}
    for name in names:
        if name in PEERS:
            peers.append(name)
            continue
        system = System.named(name, window, matched=bool(budget_of))
        try:
            system.check(device)
        except SystemUnavailable as error:
            skipped[name] = str(error)
        else:
            systems.append(system)
    if any(system.matched for system in systems) and budget_of not in [system.name for system in systems]:
        raise typer.BadParameter(f"--match {budget_of}: that system has to be among --systems")
    return systems, peers, skipped


def build_items(
    tasks: list[Task], lengths: list[int], source: Source, tokenizer: Any, count: int, seed: int, chat: bool
) -> tuple[list[tuple[Task, int, list[Item]]], list[tuple[Task, int, str]]]:
    """Items of every task and length, and the tasks whose data are not there."""
    work, missing = [], []
    for task in tasks:
        for length in lengths:
            try:
                items = task.build(source, tokenizer, length, items=count, seed=seed)
            except MissingData as error:
                missing.append((task, length, str(error)))
                continue
            if chat and task.kind != "continuation":  # text that goes on is no answer to anybody
                items = [with_chat(item, tokenizer) for item in items]
            # Items of one document come together, so that its prefill is shared.
            order = {item.document: place for place, item in reversed(list(enumerate(items)))}
            work.append((task, length, sorted(items, key=lambda item: order[item.document])))
    return work, missing


def check_lengths(lengths: list[int], config: Any, name: str) -> None:
    """Refuse contexts longer than the model allows.

    Raises
    ------
    typer.BadParameter
    """
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    long = [length for length in lengths if limit and length > limit]
    if long:
        raise typer.BadParameter(f"{name} takes {limit} tokens, but --lengths asks for {', '.join(map(str, long))}")


def legal(
    model: Annotated[str, typer.Option(help="'smollm2', or names or paths of models, comma-separated.")] = "smollm2",
    data_dir: Annotated[Path | None, typer.Option(help="Folder with local copies; default: the hub.")] = None,
    tasks: Annotated[str, typer.Option(help="Tasks, comma-separated; default all.")] = "",
    systems: Annotated[str, typer.Option(help="Systems or YAML files, comma-separated.")] = ",".join(DEFAULT),
    lengths: Annotated[str, typer.Option(help="Tokens of a prompt, comma-separated.")] = "4096,7168",
    items: Annotated[int, typer.Option(help="Items a task and length.")] = 60,
    window: Annotated[str, typer.Option(help="Window of all systems: first, most recent tokens.")] = "64,256",
    match: Annotated[
        str,
        typer.Option(
            help="StreamingLLM, InfLLM, Quest and top-k attend to as many tokens as this system does; '' for their own budgets."
        ),
    ] = "alaya",
    chat: Annotated[bool, typer.Option(help="Put prompts into the model's chat template.")] = False,
    device: Annotated[
        str, typer.Option(help="Device of the model: cpu, cuda, cuda:1, ...; auto, with --config: all GPUs.")
    ] = "cpu",
    answers: Annotated[
        str,
        typer.Option(
            help="Systems that complete their own answers, comma-separated; others give fidelity and retrieval alone."
        ),
    ] = "",
    max_new_tokens: Annotated[int, typer.Option(help="Shorten the tasks' answers to this; 0: as they are.")] = 0,
    prefill_device: Annotated[
        str, typer.Option(help="Prefill there and decode on --device; for systems without graphs.")
    ] = "",
    seed: Annotated[int, typer.Option(help="Of documents, needles and questions.")] = 0,
    shard: Annotated[
        str, typer.Option(help="RANK/COUNT: do this part of the documents. Set by accelerate launch.")
    ] = "",
    output: Annotated[
        Path | None, typer.Option(help="Results folder; default: results/ and the configuration.")
    ] = None,
    peers: Annotated[bool, typer.Option(help="Run the systems that need an environment of their own.")] = True,
    timing: Annotated[
        bool, typer.Option(help="Time one-token passes. Sharded runs, whose processes share a machine, never do.")
    ] = True,
    config: Annotated[
        Path | None,
        typer.Option(
            help="YAML with models and options, see configs/llama3_70b.yaml.",
            is_eager=True,
            callback=lambda context, value: defaults_from_file(legal)(context, value),
        ),
    ] = None,
    random_weights: Annotated[
        bool, typer.Option(help="With --config: the model's shape with random weights, for times and memory alone.")
    ] = False,
    shape: Annotated[str, typer.Option(help="With --random-weights: another shape.")] = "",
    layers: Annotated[int, typer.Option(help="With --random-weights: only so many layers; 0: all.")] = 0,
) -> None:
    """Legal tasks over systems, lengths and models; run the same command again to go on after an interruption."""
    try:
        chosen = [TASKS[name] for name in _names(tasks)] if tasks else list(TASKS.values())
    except KeyError as error:
        raise typer.BadParameter(f"unknown task {error}; available: {', '.join(TASKS)}") from error
    if max_new_tokens:
        chosen = [replace(task, max_new_tokens=min(task.max_new_tokens, max_new_tokens)) for task in chosen]
    sizes = [int(length) for length in _names(lengths)]
    init, local = (int(part) for part in window.split(","))
    rank, count = shard_of(shard)
    if device == "cuda" and "LOCAL_RANK" in os.environ:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        running, foreign, unavailable = choose_systems(_names(systems), (init, local), match, kind)
    except AlayaError as error:
        raise typer.BadParameter(str(error)) from error
    entries = _entries(config, _names(model), device, random_weights, shape)
    made_with: dict[str, Any] = {
        "models": _names(model), "tasks": [task.name for task in chosen], "systems": _names(systems), "lengths": sizes,
        "items": items, "window": [init, local], "match": match, "chat": chat, "seed": seed,
        "max_new_tokens": max_new_tokens,
    }  # fmt: skip
    if random_weights:
        made_with |= {"random_weights": shape or True, "layers": layers}
    folder = (
        output
        or Path("results") / f"legal-{'-'.join(Path(name).name for name in _names(model))}-{config_hash(made_with)}"
    )
    results = open_results(folder, rank, count, made_with, seed)
    source = Source(data_dir)
    for name in _names(model):
        entry = entries.get(name)
        # Those who lack the weights lack their tokenizer as well.
        words = name if entry is None else "smollm2" if random_weights else entry.pretrained
        try:
            work, missing = build_items(chosen, sizes, source, load_tokenizer(words), items, seed, chat)
        except DataError as error:
            raise typer.BadParameter(str(error)) from error
        network, tokenizer = (
            load(name, device)
            if entry is None
            else (
                entry.random(device, layers) if random_weights else _loaded(entry, device, max(sizes)),
                load_tokenizer(words),
            )
        )
        prefill = copy.deepcopy(network).to(prefill_device) if prefill_device else None
        check_lengths(sizes, network.config, name)
        if rank == 0:
            _note_skipped(results, name, chosen, sizes, missing, unavailable)
        run_items(
            network, tokenizer, name, work, running, results, (init, local), match, rank, count, timing, prefill,
            _names(answers) or None,
        )  # fmt: skip
        if peers and foreign and rank == 0:
            _run_peers(name, work, foreign, results, kind)
    finish(folder, rank)


def _entries(
    config: Path | None, names: list[str], device: str, random_weights: bool, shape: str
) -> dict[str, ModelEntry]:
    """The models of a file; what needs one is refused without."""
    if config is None:
        if device == "auto" or random_weights:
            raise typer.BadParameter("--device auto and --random-weights need --config, a file that names the model")
        return {}
    entries = read_models(config, "legal")[0]
    if shape:
        entries = {name: replace(entry, shape=shape) for name, entry in entries.items()}
    for name in names:
        if random_weights and (name not in entries or entries[name].shape not in SHAPES):
            raise typer.BadParameter(f"--random-weights: {config} gives no shape of {', '.join(SHAPES)} for {name!r}")
    return entries


def _loaded(entry: ModelEntry, device: str, context: int) -> Any:
    try:
        return entry.load(device, context)
    except AlayaError as error:
        raise typer.BadParameter(str(error)) from error


def finish(folder: Path, rank: int) -> None:
    """Say where the results are; of several processes, the first one does, and reports, once all are through."""
    if not launched():
        typer.echo(f"results: {folder}\nreport:  python -m eval report {folder}")
        return
    gather_rows(folder)
    if rank == 0:
        typer.echo(f"results: {folder}, {sum(1 for _ in read(folder, 'rows'))} rows of all processes")
        try:
            from eval.reporting.command import write
        except ImportError as error:
            typer.echo(f"no report ({error}): python -m eval report {folder}")
        else:
            typer.echo(f"report:  {write(folder)}")


def _note_skipped(
    results: Results,
    model: str,
    tasks: list[Task],
    lengths: list[int],
    missing: list[tuple[Task, int, str]],
    unavailable: dict[str, str],
) -> None:
    for task, length, reason in missing:
        results.skip({"model": model, "task": task.name, "length": length, "system": "*", "reason": reason})
    for system, reason in unavailable.items():
        for task in tasks:
            for length in lengths:
                results.skip({"model": model, "task": task.name, "length": length, "system": system, "reason": reason})


def run_items(
    network: Any,
    tokenizer: Any,
    name: str,
    work: list[tuple[Task, int, list[Item]]],
    systems: list[System],
    results: Results,
    window: tuple[int, int],
    match: str,
    rank: int,
    count: int,
    timing: bool = True,
    prefill_model: Any = None,
    answers: list[str] | None = None,
) -> None:
    """Run this process's share of the work, with a progress bar on the first process; sharded runs are not timed."""
    timing = timing and count == 1
    work = take_shard(work, rank, count)
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    )  # fmt: skip
    with Progress(*columns, disable=rank != 0) as progress:
        bar = progress.add_task("legal", total=sum(len(items) for *_, items in work) * len(systems))
        runner = Runner(
            network, tokenizer, name, systems, results, window, match or None, hardware(), timing, prefill_model, answers,
            on_row=lambda: progress.advance(bar),
        )  # fmt: skip
        for task, length, items in work:
            progress.update(bar, description=f"{task.name} {length}")
            runner.run(task, length, items)


def _run_peers(
    name: str, work: list[tuple[Task, int, list[Item]]], systems: list[str], results: Results, device: str
) -> None:
    from eval.peers.kvpress import KVPressSettings, PeerUnavailable, run_kvpress

    settings = KVPressSettings(device=device, dtype="float32" if device == "cpu" else "bfloat16")
    for task, length, items in work:
        try:
            run_kvpress(items, task, name, length, systems, results, settings)
        except PeerUnavailable as error:
            for system in systems:
                results.skip(
                    {"model": name, "task": task.name, "length": length, "system": system, "reason": str(error)}
                )
