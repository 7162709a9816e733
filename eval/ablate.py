"""``python -m eval ablate CONFIG``: sweep any fields of :class:`~alaya_hf.AlayaConfig`."""

from __future__ import annotations

import csv
import itertools
import json
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from alaya_hf import AlayaConfig
from alaya_hf.errors import AlayaError
from eval.legal import TASKS, Source
from eval.legal.sources import DataError
from eval.legal.text import load_tokenizer
from eval.legal_command import build_items, check_lengths, finish, open_results, run_items, shard_of
from eval.models import load
from eval.running.store import Results, config_hash
from eval.systems import System

_DEFAULTS: dict[str, Any] = {
    "model": "smollm2", "tasks": ["legal_needle_multikey"], "lengths": [4096], "items": 24, "base": "alaya",
    "window": [64, 256], "chat": False, "seed": 0,
}  # fmt: skip


def read_config(path: Path) -> dict[str, Any]:
    """An ablation from YAML, defaults filled in.

    Raises
    ------
    typer.BadParameter
        For a file that is not there, unknown keys, or a sweep that is not lists of values by field.
    """
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise typer.BadParameter(f"cannot read {path}: {error}") from error
    given = given or {}
    unknown = sorted(set(given) - {*_DEFAULTS, "sweep"})
    if unknown:
        raise typer.BadParameter(f"{path} has unknown keys {unknown}; known: {', '.join([*_DEFAULTS, 'sweep'])}")
    sweep = given.get("sweep")
    if not isinstance(sweep, dict) or not all(isinstance(values, list) and values for values in sweep.values()):
        raise typer.BadParameter(f"{path} needs 'sweep', a mapping of fields to lists of values, but has {sweep!r}")
    return {**_DEFAULTS, **given}


def settings_of(config: dict[str, Any]) -> list[System]:
    """Every combination of the swept values as a system, named after what it sets.

    Raises
    ------
    ConfigError
        For a field or value that :class:`~alaya_hf.AlayaConfig` refuses.
    """
    base = config["base"]
    base = AlayaConfig.preset(base) if isinstance(base, str) else AlayaConfig.from_dict(base)
    base = base.replace(min_context=0, window=tuple(config["window"]))
    fields, systems = list(config["sweep"]), []
    for values in itertools.product(*config["sweep"].values()):
        setting = dict(zip(fields, values, strict=True))
        name = ", ".join(f"{field}={_short(value)}" for field, value in setting.items())
        systems.append(System(name, base.override(setting), labels={"setting": setting}))
    return systems


def _short(value: Any) -> str:
    return json.dumps(value, sort_keys=True) if isinstance(value, (dict, list)) else str(value)


def write_tidy(results: Results, path: Path) -> None:
    """One line per (setting, task, length, item, layer or ``whole``) and metric, as CSV."""
    rows = list(results.rows())
    fields = list(dict.fromkeys(field for row in rows for field in row["setting"]))
    with path.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle)
        writer.writerow([*fields, "model", "task", "length", "item", "layer", "metric", "value"])
        for row in rows:
            setting = [_short(row["setting"].get(field)) for field in fields]
            start = [*setting, row["model"], row["task"], row["length"], row["item"]]
            for part in ("metrics", "retrieval", "fidelity"):
                for metric, value in row.get(part, {}).items():
                    writer.writerow([*start, "whole", metric, value])
            for metric, values in row.get("layers", {}).items():
                for layer, value in enumerate(values):
                    writer.writerow([*start, layer, metric, value])


def ablate(
    config: Annotated[Path, typer.Argument(help="YAML: model, tasks, lengths, items, base, window, sweep.")],
    data_dir: Annotated[Path | None, typer.Option(help="Folder with local copies; default: the hub.")] = None,
    device: Annotated[str, typer.Option(help="Device of the model.")] = "cpu",
    shard: Annotated[
        str, typer.Option(help="RANK/COUNT: do this part of the documents. Set by accelerate launch.")
    ] = "",
    output: Annotated[
        Path | None, typer.Option(help="Results folder; default: results/ and the configuration.")
    ] = None,
) -> None:
    """Sweep fields of AlayaConfig over legal tasks; run the same command again to go on after an interruption."""
    ablation = read_config(config)
    unknown = sorted(set(ablation["tasks"]) - set(TASKS))
    if unknown:
        raise typer.BadParameter(f"unknown tasks {unknown}; available: {', '.join(TASKS)}")
    try:
        systems = settings_of(ablation)
    except AlayaError as error:
        raise typer.BadParameter(str(error)) from error
    rank, count = shard_of(shard)
    folder = output or Path("results") / f"ablate-{config.stem}-{config_hash(ablation)}"
    results = open_results(folder, rank, count, ablation, ablation["seed"])
    name, lengths = ablation["model"], ablation["lengths"]
    try:
        tokenizer = load_tokenizer(name)
        work, missing = build_items(
            [TASKS[task] for task in ablation["tasks"]], lengths, Source(data_dir), tokenizer, ablation["items"],
            ablation["seed"], ablation["chat"],
        )  # fmt: skip
    except DataError as error:
        raise typer.BadParameter(str(error)) from error
    if missing:
        raise typer.BadParameter("; ".join(reason for *_, reason in missing))
    network, tokenizer = load(name, device)
    check_lengths(lengths, network.config, name)
    init, local = ablation["window"]
    run_items(network, tokenizer, name, work, systems, results, (init, local), "", rank, count)
    finish(folder, rank)
    # Every process, when it is through: the last one finds all rows, and the first one waits for the others.
    write_tidy(results, folder / "tidy.csv")
