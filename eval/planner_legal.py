"""Scores of legal tasks against time per token: the planner's settings among all fixed ones of the ablation."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import typer
from rich.progress import Progress

from alaya_hf import AlayaConfig
from alaya_hf.engine.device.plan import check_device
from alaya_hf.errors import ConfigError
from alaya_hf.index import Quantized
from alaya_hf.planner import ModelShape
from alaya_hf.planner.candidates import can_drive
from eval.data import long_contracts
from eval.environment import describe
from eval.legal import TASKS, Source, Task
from eval.legal.sources import DataError
from eval.legal_command import build_items, check_lengths, open_results, run_items
from eval.parallel import gather_rows, launched
from eval.planner_pareto import (
    WARM,
    Track,
    compared,
    fixed,
    measured_costs,
    planned,
    plot,
    shape_of,
    surely_less,
    tracks,
    with_columns,
)
from eval.report import markdown, write_csv
from eval.running.store import read
from eval.systems import System

#: Tasks whose scores count, each the same.
CHOSEN = (
    "legal_needle_single", "legal_needle_multikey", "legal_needle_multivalue", "legal_cuad_extract",
    "legal_contract_nli", "legal_leval_contract_qa",
)  # fmt: skip
STAGES = ("times", "scores", "judge")
_OURS = "planner, "
#: The context that the fixed windows are made from.
_WINDOW = (64, 256)


def on_device(settings: AlayaConfig, shape: ModelShape) -> AlayaConfig:
    """The same settings on the device engine where it serves them, as they are where it does not.

    Parameters
    ----------
    settings : AlayaConfig
        Those with a target stay as they are: the planner picks their engine.
    shape : ModelShape
        Of the model, with its device.

    Notes
    -----
    The device engine scores nothing again, so the index ``quantized`` has a margin of 0 there, and queries without a cap have the
    engine's own.
    """
    if settings.plans or can_drive(shape) is not None:
        return settings
    index = replace(settings.index, margin=0.0) if isinstance(settings.index, Quantized) else settings.index
    try:
        moved = settings.replace(engine="device", index=index)
        check_device(moved)
    except ConfigError:
        return settings
    return moved


def systems_of(
    shape: ModelShape, indexes: Sequence[str], recoveries: Sequence[float], kls: Sequence[float]
) -> list[System]:
    """Full attention as Transformers has it, every fixed configuration, the presets, and the planner's settings.

    The preset ``full``, which attends to everything through our store, is called ``preset full`` here.
    """
    settings = {**fixed(indexes=indexes), **planned(recoveries, kls)}
    found = [System("full")]
    for name, given in settings.items():
        own = on_device(given, shape)
        found.append(System("preset full" if name == "full" else name, own, labels={"settings": own.to_dict()}))
    return found


@dataclass(frozen=True)
class LegalPareto:
    """What is run, scored and timed.

    Parameters
    ----------
    model, device : str
    data_dir : Path
    tasks : tuple of str
        Whose score is better when higher.
    tokens : int
        Of a prompt, and of the contracts that steps are timed on.
    items, seed : int
        Of the tasks.
    documents, skip, steps : int
        Contracts for the times, those left out before them, and the steps at the end of each.
    indexes, recoveries, kls : tuple
        See :func:`systems_of`.
    folder : Path
        For rows, times and results.
    """

    model: str
    device: str
    data_dir: Path
    tasks: tuple[str, ...]
    tokens: int
    items: int
    seed: int
    documents: int
    skip: int
    steps: int
    indexes: tuple[str, ...]
    recoveries: tuple[float, ...]
    kls: tuple[float, ...]
    folder: Path

    def check(self) -> None:
        """Refuse tasks that do not give scores.

        Raises
        ------
        typer.BadParameter
        """
        unknown = sorted(set(self.tasks) - set(TASKS))
        if unknown:
            raise typer.BadParameter(f"unknown tasks {unknown}; available: {', '.join(TASKS)}")
        lower = [name for name in self.tasks if not TASKS[name].higher_is_better]
        if lower:
            raise typer.BadParameter(f"--part legal compares scores, but {', '.join(lower)} has none: less is better")

    @property
    def timed(self) -> dict[str, Any]:
        """What the times were taken on."""
        names = ("model", "device", "tokens", "documents", "skip", "steps")
        return {name: getattr(self, name) for name in names}

    def run(self, stages: Sequence[str], load: Callable[[], tuple[Any, Any]], rank: int, count: int) -> list[str]:
        """Do what is asked for; returns the parts of the page if there is a judgement.

        Parameters
        ----------
        stages : sequence of str
            Of :data:`STAGES`. Processes that share the scores do nothing else: they would disturb each other's times.
        load : callable
            The model and its tokenizer.
        rank, count : int
            This process among those that share the scores.

        Raises
        ------
        typer.BadParameter
            If several processes have no calibration to plan by, or there is nothing to judge.
        """
        self.check()
        calibration = self.folder / "calibration.json"
        if count > 1:
            stages = ("scores",)
            if not calibration.exists():
                raise typer.BadParameter(
                    f"several processes would disturb each other's calibration, and {calibration} is not there. Run "
                    "`--stage times` first, in one process."
                )
        if set(stages) & {"times", "scores"}:
            network, tokenizer = load()
            check_lengths([self.tokens], network.config, self.model)
            measured_costs(network, self.folder, again=False)
            systems = systems_of(shape_of(network), self.indexes, self.recoveries, self.kls)
            if "times" in stages:
                self.time(network, tokenizer, systems)
            if "scores" in stages:
                self.score(network, tokenizer, systems, rank, count)
        return self.judge() if "judge" in stages else []

    def time(self, network: Any, tokenizer: Any, systems: Sequence[System]) -> None:
        """Time every system, step by step in turn, and keep the times in the folder; not if they are there already."""
        path = self.folder / "times.json"
        names = {system.name for system in systems}
        if path.exists():
            held = json.loads(path.read_text(encoding="utf-8"))
            if held["timed"] == self.timed and names <= set(held["tracks"]):
                return
        texts = [ids for _, ids in long_contracts(self.data_dir, tokenizer, self.tokens, self.skip + self.documents)]
        with Progress() as progress:
            bar = progress.add_task("times", total=self.documents * self.steps)
            found = tracks(network, texts[self.skip :], self.steps, systems, lambda: progress.advance(bar))
        kept = {"timed": self.timed, "about": describe(), "warm": WARM[network.device.type]}
        tracked = {name: asdict(track) for name, track in found.items()}
        path.write_text(json.dumps({**kept, "tracks": tracked}), encoding="utf-8")

    def score(self, network: Any, tokenizer: Any, systems: list[System], rank: int, count: int) -> None:
        """Answer the items of this process, those that are not answered yet.

        Raises
        ------
        typer.BadParameter
            If a task's data are not there, or the folder holds rows of other options.
        """
        made_with = {
            "models": [self.model], "tasks": list(self.tasks), "systems": [system.name for system in systems],
            "lengths": [self.tokens], "items": self.items, "seed": self.seed, "device": self.device,
        }  # fmt: skip
        results = open_results(self.folder, rank, count, made_with, self.seed)
        tasks = [TASKS[name] for name in self.tasks]
        try:
            work, missing = build_items(
                tasks, [self.tokens], Source(self.data_dir), tokenizer, self.items, self.seed, False
            )
        except DataError as error:
            raise typer.BadParameter(str(error)) from error
        if missing:
            raise typer.BadParameter("; ".join(reason for *_, reason in missing))
        run_items(network, tokenizer, self.model, work, systems, results, _WINDOW, "", rank, count, timing=False)
        if launched():
            gather_rows(self.folder)

    def judge(self) -> list[str]:
        """``legal.csv`` and ``legal.png``, and the page's parts: which of the planner's settings are below the front.

        Raises
        ------
        typer.BadParameter
            If there are no times, or no item that all timed systems have answered.
        """
        path = self.folder / "times.json"
        if not path.exists():
            raise typer.BadParameter(f"there are no times in {self.folder}. Run `--stage times` first.")
        held = json.loads(path.read_text(encoding="utf-8"))
        found = {name: Track(**track) for name, track in held["tracks"].items()}
        wanted = {(self.model, task, self.tokens) for task in self.tasks}
        answered = [row for row in read(self.folder, "rows") if (row["model"], row["task"], row["length"]) in wanted]
        rows, counts = judged(answered, found, [TASKS[name] for name in self.tasks])
        if not rows:
            raise typer.BadParameter(
                f"no item of {', '.join(self.tasks)} was answered by all systems that were timed. Run `--stage scores`."
            )
        write_csv(self.folder / "legal.csv", rows)
        plot(rows, self.folder / "legal.png", "score", "mean score over the legal tasks (0 to 100)")
        what = ", ".join(f"{count} of {name}" for name, count in counts.items())
        title = (
            f"{self.model}, prompts of {self.tokens} tokens: {what}; times over {self.documents} contracts, "
            f"{self.steps} steps each, from step {held['warm'] + 1} on"
        )
        lost = sorted(set(found) - {row["configuration"] for row in rows})
        notes = [f"without rows, left out: {', '.join(lost)}"] if lost else []
        return [held["about"], title, *notes, verdict(rows), markdown(selection(rows))]


def judged(
    rows: Iterable[Mapping[str, Any]], found: Mapping[str, Track], tasks: Sequence[Task]
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Rows of the table, by time, from result rows of one model and length.

    Parameters
    ----------
    rows : iterable of mapping
        As the runner keeps them.
    found : mapping of str to Track
        Times by configuration; those without result rows are left out.
    tasks : sequence of Task
        Each weighs the same.

    Returns
    -------
    rows : list of dict
        See :func:`~eval.planner_pareto.compared`; the loss of an item is its score's distance from 100. Empty if no item was
        answered by all configurations.
    counts : dict
        Items of each task that all have answered; no others count.
    """
    given: dict[str, dict[tuple[str, str], Mapping[str, Any]]] = {}
    for row in rows:
        if row["system"] in found:
            given.setdefault(row["system"], {})[row["task"], row["item"]] = row
    common = set.intersection(*(set(items) for items in given.values())) if given else set()
    order = sorted(common)
    metric = {task.name: task.metric for task in tasks}
    counts = {name: sum(task == name for task, _ in order) for name in metric}
    counts = {name: count for name, count in counts.items() if count}
    if not order:
        return [], {}
    # An item's share in a mean that every task weighs the same in.
    weight = {name: len(order) / (len(counts) * count) for name, count in counts.items()}

    def mean(values: Mapping[tuple[str, str], float]) -> float:
        return statistics.fmean(weight[key[0]] * values[key] for key in order)

    scores = {
        name: {key: 100 * float(items[key]["metrics"][metric[key[0]]]) for key in order}
        for name, items in given.items()
    }
    losses = {name: [weight[key[0]] * (100 - own[key]) for key in order] for name, own in scores.items()}
    # Items of one document share its text: those that are sure item by item are also asked document by document.
    documents = [(key[0], next(iter(given.values()))[key]["document"]) for key in order]
    by_document = {
        name: [
            sum(loss for loss, of in zip(own, documents, strict=True) if of == each)
            for each in dict.fromkeys(documents)
        ]
        for name, own in losses.items()
    }
    ours = {name for name in given if name.startswith(_OURS)}
    table = []
    for row in compared({name: found[name] for name in given}, losses, ours):
        name = row["configuration"]
        track, items = found[name], given[name]
        fidelity = {key: items[key].get("fidelity", {"kl": 0.0, "top1": 1.0}) for key in order}
        retrieved = [items[key].get("retrieval", {}).get("retrieved") for key in order]
        columns: dict[str, Any] = {"score": mean(scores[name])}
        for task, count in counts.items():
            columns[task.removeprefix("legal_")] = sum(scores[name][key] for key in order if key[0] == task) / count
        columns |= {
            "KL": mean({key: one["kl"] for key, one in fidelity.items()}),
            "same top token %": 100 * mean({key: one["top1"] for key, one in fidelity.items()}),
            "retrieved": None if None in retrieved else statistics.fmean(retrieved),
            "engine": track.engine, "replays": track.replays, "plans": track.plans, "moves": track.moves,
        }  # fmt: skip
        surer = [
            other
            for other in filter(None, row["surely"].split("; "))
            if surely_less(by_document[other], by_document[name], statistics.fmean)
        ]
        table.append({**with_columns(row, columns), "surely, by document": "; ".join(surer)})
    return table, counts


def verdict(rows: Sequence[Mapping[str, Any]]) -> str:
    """How many of the planner's settings are below the front of the fixed configurations."""
    ours = [row for row in rows if row["planner"]]

    def named(found: list[Mapping[str, Any]]) -> str:
        names = "; ".join(row["configuration"].removeprefix(_OURS) for row in found)
        return f"{len(found)} ({names})" if found else "0"

    below = [row for row in ours if row["beaten by"]]
    return (
        f"of {len(ours)} settings of the planner, below the front (a fixed configuration is faster and scores higher): "
        f"{named(below)}; surely: {named([row for row in below if row['surely']])}, with documents resampled instead of items: "
        f"{named([row for row in below if row['surely, by document']])}. Others that a faster one equals in score: "
        f"{named([row for row in ours if row['equalled by'] and not row['beaten by']])}"
    )


def selection(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The planner's settings, the front, presets and full attention; how many faster ones equal or beat them, not which."""
    counted = ("equalled by", "beaten by")
    return [
        {**row, **{column: len(row[column].split("; ")) if row[column] else 0 for column in counted}}
        for row in rows
        if row["planner"] or row["on the front"] or "," not in row["configuration"]
    ]


def stages_of(text: str) -> tuple[str, ...]:
    """``"all"``, or one of :data:`STAGES`.

    Raises
    ------
    typer.BadParameter
    """
    if text != "all" and text not in STAGES:
        raise typer.BadParameter(f"--stage takes all, {', '.join(STAGES)}, but got {text!r}")
    return STAGES if text == "all" else (text,)
