"""The report as one HTML page and as Markdown, from the same sections."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2

from eval.report import markdown
from eval.reporting import formatting
from eval.reporting.ablation import swept
from eval.reporting.drawing import Panel, Plot
from eval.reporting.load import Results
from eval.reporting.losses import Losses
from eval.reporting.measures import BY_NAME, COST, FIDELITY, RETRIEVAL, SCORES, Measure
from eval.reporting.statistics import CONFIDENCE, RESAMPLES
from eval.reporting.systems import FULL, OURS, SYSTEMS, look, order
from eval.reporting.tables import EVERY, Table

MARKS = {"=": "same", "+": "better", "-": "worse", "?": "open", "": ""}
SIGNS = {"=": "=", "+": "+", "-": formatting.MINUS, "?": "?", "": ""}


@dataclass(frozen=True)
class Cell:
    """One cell: a value, its interval, a difference with its mark, a note."""

    text: str = ""
    interval: str = ""
    gap: str = ""
    mark: str = ""
    note: str = ""

    @property
    def plain(self) -> str:
        """On one line."""
        mark = f"({SIGNS[self.mark]})" if self.mark else ""
        return " ".join(part for part in (self.text, self.interval, self.gap, mark, self.note) if part)


@dataclass(frozen=True)
class Sheet:
    """A table as it is shown: a title, column heads with second lines, rows whose first cell names a system."""

    title: str
    heads: list[tuple[str, str]]
    rows: list[list[Cell]]
    long: bool = False


@dataclass(frozen=True)
class Section:
    """A section: tables and figures, each with the sentence that says how to read it."""

    key: str
    title: str
    text: list[str] = field(default_factory=list)
    reading: str = ""
    sheets: list[Sheet] = field(default_factory=list)
    plots: list[Plot] = field(default_factory=list)
    groups: list[tuple[str, list[tuple[str, str]]]] = field(default_factory=list)


@dataclass(frozen=True)
class Tables:
    """Every table of the report."""

    headline: Table
    overall: Table
    fidelity: Table
    retrieval: Table
    cost: Table
    losses: Losses
    absent: Table
    ablation: Table


def sections(
    results: Results, metrics: dict[str, Measure], tables: Tables, plots: dict[str, list[Plot]]
) -> list[Section]:
    """The report's sections in order; those without content are left out."""
    found = [
        _headline(results, metrics, tables),
        _fidelity(tables),
        _retrieval(tables),
        _cost(tables),
        _figures(plots["figures"]),
        _losses(results, tables.losses),
        _ablation(results, tables.ablation, plots["ablation"]),
        _absent(results, tables.absent),
        _glossary(results, metrics),
    ]
    return [section for section in found if section is not None]


def summary(results: Results, tables: Tables) -> list[tuple[str, str, str]]:
    """``(value, what it is, of what)`` for the top of the page: our system at each model's longest context."""
    tiles = []
    for model in results.models:
        marks = [
            row["mark"] for row in tables.headline if (row["model"], row["system"]) == (model, OURS) and row["mark"]
        ]
        if marks:
            fine = sum(one in "=+" for one in marks)
            tiles.append(
                (f"{fine} of {len(marks)}", "tasks and lengths not measurably worse than full attention", model)
            )
        longest = max(results.lengths(model))
        where = f"{model}, {formatting.length(longest)} tokens"

        def of(table: Table, name: str, model: str = model, longest: int = longest) -> float | None:
            keys = (model, longest, OURS)
            return next((row[name] for row in table if (row["model"], row["length"], row["system"]) == keys), None)

        for table, name, text in (
            (tables.retrieval, "share", "of the context attended exactly"),
            (tables.retrieval, "evidence_recall", "of the evidence among the exactly attended tokens"),
            (tables.cost, "device_share", "of the KV bytes beside the model"),
        ):
            value = of(table, name)
            if value is not None:
                tiles.append((f"{value:.1f} %", text, where))
        kl = of(tables.fidelity, "kl")
        if kl is not None:
            tiles.append((formatting.nats(kl), "nats from full attention's next token (KL)", where))
    return tiles


def html(results: Results, found: Sequence[Section], tiles: Sequence[tuple[str, str, str]]) -> str:
    """One page without any reference to other files or the network."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.globals |= {"look": look, "known": SYSTEMS, "image": _image, "marks": MARKS, "signs": SIGNS}
    return environment.get_template("page.html.jinja").render(
        title=_title(results),
        facts=_facts(results),
        notes=results.notes,
        tiles=tiles,
        sections=found,
        run=_run_facts(results),
        config=json.dumps(results.run, indent=2, ensure_ascii=False, default=str) if results.run else "",
        ours=OURS,
        has_ours=OURS in {row.system for row in (*results.rows, *results.ablation)},
    )


def markdown_page(results: Results, found: Sequence[Section], tiles: Sequence[tuple[str, str, str]]) -> str:
    """The same as Markdown; plots are files in ``plots/``."""
    lines = [f"# {_title(results)}", "", _facts(results), ""]
    lines += [f"> {note}\n" for note in results.notes]
    lines += [f"* **{value}** {text} ({where})" for value, text, where in tiles]
    for section in found:
        lines += ["", f"## {section.title}", ""]
        lines += [f"{text}\n" for text in section.text]
        if section.reading:
            lines += [f"*{section.reading}*", ""]
        for sheet in section.sheets:
            heads = [" ".join(part for part in head if part) for head in sheet.heads]
            rows = [
                {head: cell.plain.replace("|", "\\|").replace("\n", " ") for head, cell in zip(heads, row, strict=True)}
                for row in sheet.rows
            ]
            lines += [f"**{sheet.title}**", ""] if sheet.title else []
            lines += [markdown(rows), ""]
        for plot in section.plots:
            lines += [f"### {plot.title}", "", f"*{plot.reading}*", ""]
            lines += [f"![{panel.title}](plots/{slug(panel.name)}.svg)" for panel in plot.panels]
            lines += ["", *[f"{note}\n" for note in plot.notes]]
        for title, entries in section.groups:
            lines += [f"**{title}**", "", *[f"* **{name}**: {text}" for name, text in entries], ""]
    lines += ["", "## How this was run", "", *[f"* {name}: {value}" for name, value in _run_facts(results)]]
    if results.run:
        lines += ["", "```json", json.dumps(results.run, indent=2, ensure_ascii=False, default=str), "```"]
    return "\n".join(lines) + "\n"


def slug(name: str) -> str:
    """A file's name: letters, digits, dots, dashes and underscores only."""
    return "".join(letter if letter.isalnum() or letter in "._-" else "_" for letter in name)


def _title(results: Results) -> str:
    return f"Evaluation report: {results.folder.resolve().name}"


def _facts(results: Results) -> str:
    rows = [*results.rows, *results.ablation]
    models = ", ".join(dict.fromkeys(row.model for row in rows)) or "no model"
    lengths = ", ".join(f"{length:,}" for length in sorted({row.length for row in rows})) or "no"
    counts = {
        "task": len({row.task for row in rows}),
        "document": len({row.document for row in rows}),
        "answer": len(rows),
    }
    told = ", ".join(f"{count:,} {name}{'' if count == 1 else 's'}" for name, count in counts.items())
    facts = f"{models}; contexts of {lengths} tokens; {told}"
    return f"{facts}; {results.run['date']}." if results.run.get("date") else f"{facts}."


def _image(panel: Panel) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(panel.image).decode()


def _run_facts(results: Results) -> list[tuple[str, str]]:
    run = results.run
    machines = list(dict.fromkeys(row.hardware for row in (*results.rows, *results.ablation) if row.hardware))
    facts = [("hardware", "; ".join(machines) or str(run.get("hardware") or "not recorded"))]
    versions = run.get("versions")
    told = (
        ", ".join(f"{name} {version}" for name, version in versions.items()) if isinstance(versions, dict) else versions
    )
    facts.append(("versions", str(told or "not recorded")))
    facts += [(name, str(run.get(name, "not recorded"))) for name in ("commit", "date", "seed", "command")]
    for later in run.get("later_runs", []):
        told = ", ".join(f"{name} {version}" for name, version in (later.get("versions") or {}).items())
        parts = [later.get("command"), later.get("hardware"), told, later.get("commit"), later.get("date")]
        facts.append(("later run", "; ".join(str(part) for part in parts if part)))
    intervals = (
        f"percentile bootstrap, {RESAMPLES:,} resamples of whole documents, {CONFIDENCE:.0%}; paired item by item"
    )
    return [*facts, ("intervals", intervals)]


def _plain(row: dict[str, Any], measures: Sequence[Measure]) -> list[Cell]:
    cells = []
    for measure in measures:
        name, kind = measure.name, measure.kind
        if row[name] is None:
            cells.append(Cell("–"))
            continue
        bounds = formatting.interval(kind, row[name], row[f"{name}_low"], row[f"{name}_high"])
        cells.append(Cell(formatting.value(kind, row[name]), bounds))
    return cells


def _heads(measures: Sequence[Measure]) -> list[tuple[str, str]]:
    units = {"points": "%", "nats": "nats", "tokens": "per head", "seconds": "", "change": ""}
    return [(measure.title, units[measure.kind]) for measure in measures]


def _per_size(table: Table, measures: Sequence[Measure], heads: list[tuple[str, str]], extra: str = "") -> list[Sheet]:
    sheets = []
    for model, length in dict.fromkeys((row["model"], row["length"]) for row in table):
        rows = [row for row in table if (row["model"], row["length"]) == (model, length)]
        shown = [measure for measure in measures if any(row[measure.name] is not None for row in rows)]
        kept = [head for head, measure in zip(heads, measures, strict=True) if measure in shown]
        body = [
            [
                Cell(row["system"]),
                *_plain(row, shown),
                *([Cell(row[extra])] if extra else []),
                Cell(f"{row['items']:,}"),
            ]
            for row in rows
        ]
        tail = [(extra, "")] if extra else []
        sheets.append(
            Sheet(f"{model}, {formatting.length(length)} tokens", [("system", ""), *kept, *tail, ("items", "")], body)
        )
    return sheets


def _headline(results: Results, metrics: dict[str, Measure], tables: Tables) -> Section | None:
    if not tables.headline:
        return None
    cells = {(row["model"], row["length"], row["task"], row["system"]): row for row in tables.headline}
    totals = {(row["model"], row["length"], row["system"]): row for row in tables.overall}
    ran = results.cells()
    sheets = []
    for model in results.models:
        for length in results.lengths(model):
            tasks = results.tasks(model, length)
            here = [row for row in tables.headline if (row["model"], row["length"]) == (model, length)]
            most = {task: max(row["items"] for row in here if row["task"] == task) for task in tasks}
            texts = {task: max(row["documents"] for row in here if row["task"] == task) for task in tasks}
            has_total = any(key[:2] == (model, length) for key in totals) and len(tasks) > 1
            heads = [("system", "")]
            heads += [("all tasks", "mean difference to full, points")] if has_total else []
            heads += [
                (_short(task), f"{metrics[task].title}, {most[task]} items, {texts[task]} documents") for task in tasks
            ]
            body = []
            for system in order(row["system"] for row in here):
                line = [Cell(system)]
                if has_total:
                    line.append(_total(totals.get((model, length, system)), system))
                for task in tasks:
                    row = cells.get((model, length, task, system))
                    missing = "no answers" if (model, length, task, system) in ran else "not run"
                    line.append(Cell("–", note=missing) if row is None else _score(row, metrics[task], most[task]))
                body.append(line)
            sheets.append(Sheet(f"{model}, {formatting.length(length)} tokens", heads, body))
    reading = (
        "Each cell gives the task's mean score (0 to 100; for perplexity lower is better) with its 95 % interval, and below it "
        "the paired difference to full attention: = means within 1 point (1 % of the perplexity) or an interval that holds 0, "
        f"+ better, {formatting.MINUS} worse, ? open (a single document)."
    )
    text = ["Intervals that round to their value are not written out."]
    if not any(row["difference"] is not None for row in tables.headline):
        text += [f"The results hold no answers of {FULL}, so nothing is compared with it."]
    return Section("headline", "Quality", text, reading, sheets)


def _short(task: str) -> str:
    return task.removeprefix("legal_").replace("_", " ")


def _score(row: dict[str, Any], measure: Measure, most: int) -> Cell:
    kind = measure.kind
    bounds = formatting.interval(kind, row["mean"], row["mean_low"], row["mean_high"])
    gap = ""
    if row["difference"] is not None:
        around = _around(kind, row)
        gap = f"{formatting.gap(kind, row['difference'])} {around}".strip()
    note = "" if row["items"] == most else f"{row['items']} items only"
    return Cell(formatting.value(kind, row["mean"]), bounds, gap, row["mark"], note)


def _total(row: dict[str, Any] | None, system: str) -> Cell:
    if row is None:
        return Cell("reference" if system == FULL else "–")
    around = _around("points", row)
    note = "" if row["tasks"] == row["of"] else f"{row['tasks']} of {row['of']} tasks"
    return Cell("", "", f"{formatting.gap('points', row['difference'])} {around}".strip(), row["mark"], note)


def _fidelity(tables: Tables) -> Section | None:
    if not tables.fidelity:
        return None
    reading = (
        "How close each system stays to full attention, whatever the right answer is, over all tasks: KL near 0 and the shares "
        "near 100 % mean that it says the same; brackets are 95 % intervals."
    )
    sheets = _per_size(tables.fidelity, FIDELITY, _heads(FIDELITY))
    return Section("fidelity", "Fidelity to full attention", [], reading, sheets)


def _retrieval(tables: Tables) -> Section | None:
    if not tables.retrieval:
        return None
    reading = (
        "What a query head attends to exactly, and how much of the gold evidence and of full attention's probability mass that "
        "holds; systems with a low-bit copy or block means see the other tokens approximately, which does not count here."
    )
    sheets = _per_size(tables.retrieval, RETRIEVAL, _heads(RETRIEVAL))
    text = ["Full attention attends to everything, so its shares are 100 % by definition."]
    return Section("retrieval", "Retrieval", text, reading, sheets)


def _cost(tables: Tables) -> Section | None:
    if not tables.cost:
        return None
    reading = (
        "Time of one decoding step and memory beside the model, means over all items with 95 % intervals; compare times only "
        "within one hardware."
    )
    machines = list(dict.fromkeys(row["hardware"] for row in tables.cost))
    text = [f"All on {machines[0] or 'hardware that was not recorded'}."] if len(machines) == 1 else []
    extra = "hardware" if len(machines) > 1 else ""
    return Section("cost", "Time and memory", text, reading, _per_size(tables.cost, COST, _heads(COST), extra))


def _figures(plots: list[Plot]) -> Section | None:
    text = "A system has the same colour and mark everywhere; its name stands to the right of the panel, at its height."
    return Section("figures", "Figures", [text], plots=plots) if plots else None


def _losses(results: Results, losses: Losses) -> Section | None:
    if not results.rows or (results.ablation and OURS not in results.systems):
        return None
    title = f"Where {OURS} loses"
    if OURS not in results.systems:
        return Section("losses", title, [f"{OURS} was not run in this folder."])
    text = [
        f"Every task, length and metric in which {OURS} is significantly behind full attention, or behind another system that "
        "attends exactly to no more tokens: the paired 95 % interval lies wholly on the wrong side of 0, however small the "
        "difference. Against full attention the headline metric and the time per token are compared, against others the headline "
        f"metric, fidelity and retrieval. {losses.comparisons:,} comparisons were made; about one in forty would be listed "
        "by chance alone."
    ]
    if losses.unobserved:
        text.append(
            f"Compared although nobody observed how many tokens they attend to: {', '.join(losses.unobserved)}."
        )
    if not losses.table:
        none = "None." if losses.comparisons else "Nothing could be compared: no items in common, or a single document."
        return Section("losses", title, [*text, none])
    sheets = []
    for name, rows in (
        ("full attention", [row for row in losses.table if row["behind"] == FULL]),
        ("systems that attend to no more tokens", [row for row in losses.table if row["behind"] != FULL]),
    ):
        body = [
            [
                Cell(row["behind"]), Cell(row["model"]), Cell(formatting.length(row["length"])), Cell(_short(row["task"])),
                Cell(row["metric"]), Cell(formatting.value(row["kind"], row[OURS])),
                Cell(formatting.value(row["kind"], row["other"])), _gap(row), Cell(_attended(row)), Cell(str(row["items"])),
            ]
            for row in rows
        ]  # fmt: skip
        columns = (
            "behind",
            "model",
            "length",
            "task",
            "metric",
            OURS,
            "other",
            "difference",
            "attended: ours / other",
            "items",
        )
        if body:
            sheets.append(
                Sheet(f"Behind {name}: {len(body)}", [(column, "") for column in columns], body, len(body) > 25)
            )
        else:
            text.append(f"Behind {name}: none.")
    reading = "One row per loss: our mean, the other's mean, and the paired difference (ours minus the other's)."
    return Section("losses", title, text, reading, sheets)


def _around(kind: str, row: dict[str, Any]) -> str:
    return formatting.gap_interval(kind, row["difference"], row["difference_low"], row["difference_high"])


def _gap(row: dict[str, Any]) -> Cell:
    # Losses may be small: two decimals, and always their interval.
    kind = row["kind"]
    bounds = (row["difference"], row["difference_low"], row["difference_high"])
    middle, low, high = (formatting.signed(one, 2) if kind == "points" else formatting.gap(kind, one) for one in bounds)
    return Cell(middle, f"[{low}, {high}]")


def _attended(row: dict[str, Any]) -> str:
    found = (row["attended"], row["other_attended"])
    return " / ".join("not observed" if one is None else formatting.tokens(one) for one in found)


def _ablation(results: Results, table: Table, plots: list[Plot]) -> Section | None:
    if not table:
        return None
    names = ("evidence_recall", "kl", "attended", "share", "seconds_per_token")
    measures = [BY_NAME[name] for name in names if any(row[name] is not None for row in table)]
    fields = list(swept(results.ablation)) or list(
        dict.fromkeys(name for row in results.ablation for name in row.setting)
    )
    sheets = []
    for model, length, system in dict.fromkeys((row["model"], row["length"], row["system"]) for row in table):
        body = []
        for row in table:
            if (row["model"], row["length"], row["system"]) != (model, length, system):
                continue
            bounds = (row["score"], row["score_low"], row["score_high"])
            score = (
                Cell("–") if row["score"] is None else Cell(f"{bounds[0]:.1f}", formatting.interval("points", *bounds))
            )
            if row["difference"] is not None:
                gap = f"{formatting.gap('points', row['difference'])} {_around('points', row)}".strip()
                score = Cell(score.text, score.interval, gap)
            body.append(
                [*(Cell(row[name]) for name in fields), score, *_plain(row, measures), Cell(f"{row['items']:,}")]
            )
        heads = [*((name, "") for name in fields), ("score", "mean over tasks"), *_heads(measures), ("items", "")]
        sheets.append(Sheet(f"{system}: {model}, {formatting.length(length)} tokens", heads, body, len(body) > 25))
    reading = (
        "One row per setting of the swept fields: mean score over the tasks (0 to 100) with the difference to full attention "
        "where that was run, evidence recall, divergence from full attention and cost, with 95 % intervals."
    )
    return Section("ablation", "Ablation", [], reading, sheets, plots)


def _absent(results: Results, table: Table) -> Section:
    present = {row.system for row in (*results.rows, *results.ablation)}
    told = {row["system"] for row in table}
    others = [name for name in SYSTEMS if name not in present and name not in told]
    text = []
    if others:
        text.append(f"Known to the evaluation but no part of this run: {', '.join(others)}.")
    if not table:
        return Section("absent", "Not run", [*text, "Every system of this run answered every item."])
    body = [
        [
            Cell("every system" if row["system"] == EVERY else row["system"]),
            Cell(row["model"]),
            Cell(row["reason"]),
            Cell(row["tasks"]),
            Cell(row["lengths"]),
        ]
        for row in table
    ]
    heads = [(name, "") for name in ("system", "model", "reason", "tasks", "lengths")]
    reading = (
        "One row per system and reason: what is missing from the tables above, on which tasks and lengths, and why."
    )
    return Section("absent", "Not run", text, reading, [Sheet("", heads, body)])


def _glossary(results: Results, metrics: dict[str, Measure]) -> Section:
    scores = []
    for name in dict.fromkeys(measure.name for measure in metrics.values()):
        tasks = ", ".join(task for task, measure in metrics.items() if measure.name == name)
        known = SCORES.get(name, "The task's own score, see its documentation.")
        scores.append(("perplexity" if name == "nll" else name, f"{known} Judges {tasks}."))
    rows = [*results.rows, *results.ablation]
    kept = [measure for measure in BY_NAME.values() if any(measure.get(row) is not None for row in rows)]
    systems = [(name, look(name).text) for name in order(row.system for row in rows)]
    statistics = [
        (
            "95 % interval",
            f"Percentile bootstrap with {RESAMPLES:,} resamples of whole documents, because questions on one document are not "
            "independent; with fewer than about ten documents it is too narrow, and one document gives none.",
        ),
        ("paired difference", "Mean of the differences item by item, over the items that both systems answered."),
        ("point", "One hundredth of a score's range, which is 0 to 100."),
        (
            "all tasks",
            "Mean over the tasks scored in points of the mean difference to full attention, each task counting once.",
        ),
    ]
    groups = [
        ("Scores", scores),
        ("Measures", [(measure.title, measure.text) for measure in kept]),
        ("Statistics", statistics),
        ("Systems", systems),
    ]
    return Section("glossary", "Glossary", groups=[group for group in groups if group[1]])
