"""The report says what the rows say, resamples documents, and hides nothing that was not run."""

from __future__ import annotations

import csv
import itertools
import json
import math
import random
import re
from collections import defaultdict
from html.parser import HTMLParser
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from eval.reporting.command import report, write
from eval.reporting.drawing import spread
from eval.reporting.load import ResultsError, load
from eval.reporting.measures import headline
from eval.reporting.statistics import Estimate, estimate, mark, significant

METRICS = {"legal_needle_single": "score", "legal_ppl": "nll", "made_up": "accuracy"}
ATTENDED = {"streaming_llm": 320.0, "alaya": 430.0, "topk": 600.0}
SCORES = {"full": 0.8, "streaming_llm": 0.2, "alaya": 0.8, "topk": 0.6, "quantized_cache": 0.7}


def row(system: str, task: str, item: int, value: float, length: int = 4096, **more: Any) -> dict[str, Any]:
    """A result row; two items share a document."""
    found: dict[str, Any] = {
        "model": "tiny",
        "task": task,
        "length": length,
        "system": system,
        "item": f"item {item}",
        "document": f"document {item // 2}",
        "labels": {"depth": item % 4 / 4} if "needle" in task else {},
        "answer": "<script>alert(1)</script>",
        "metrics": {METRICS[task]: value},
        "seconds_per_token": 0.02,
        "device_bytes": 3e5,
        "full_bytes": 1e6,
        "hardware": "a machine & <another>",
    }
    if system in ATTENDED:
        found["retrieval"] = {"attended": ATTENDED[system], "context": 4000.0, "evidence_recall": value % 1}
        found["layers"] = {"retrieved": [ATTENDED[system] - 320, 12.0], "evidence_recall": [0.5, None]}
    if system != "full":
        found["fidelity"] = {"kl": 0.001, "top1": 0.9, "agreement": 1.0, "steps": 4, "nll_difference": 0.01}
    return found | more


def made(seed: int = 0, items: int = 12) -> list[dict[str, Any]]:
    """Rows of every system, task and length."""
    draw, found = random.Random(seed), []
    for length, task, item in itertools.product((4096, 8192), METRICS, range(items)):
        for system, quality in SCORES.items():
            value = 2 + draw.random() if task == "legal_ppl" else float(draw.random() < quality)
            found.append(row(system, task, item, value, length))
    return found


def keep(folder: Path, rows: list[dict[str, Any]], skipped: list[dict[str, Any]] | None = None) -> Path:
    """A results folder."""
    folder.mkdir(exist_ok=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")
    (folder / "skipped.jsonl").write_text("".join(json.dumps(one) + "\n" for one in skipped or []), encoding="utf-8")
    run = {
        "command": "run it",
        "config": {"secret": 17},
        "versions": {"torch": "2.x"},
        "commit": "abc",
        "date": "2026-01-02",
    }
    (folder / "run.json").write_text(json.dumps(run), encoding="utf-8")
    return folder


def table(folder: Path, name: str) -> list[dict[str, str]]:
    with (folder / "tables" / f"{name}.csv").open(encoding="utf-8") as handle:
        return list(csv.DictReader(handle))


class Page(HTMLParser):
    """Tables as texts of cells by their heading, and every reference."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: dict[tuple[str, str], list[list[str]]] = {}
        self.references: list[tuple[str, str]] = []
        self.tags: set[str] = set()
        self.text = ""
        self._heads = {"h2": "", "h3": ""}
        self._tag = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self._tag = tag if tag in ("h2", "h3", "style") or not self._tag else self._tag
        linking = {"src", "href", "srcset", "data", "action", "poster"}
        self.references += [(tag, value or "") for name, value in attrs if name in linking]
        if tag in ("h2", "h3"):
            self._heads[tag] = ""
        rows = self.tables.setdefault((self._heads["h2"], self._heads["h3"]), [])
        if tag == "tr":
            rows.append([])
        if tag in ("td", "th"):
            rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("h2", "h3", "style"):
            self._tag = ""

    def handle_data(self, data: str) -> None:
        if self._tag == "style":
            return
        self.text += data
        if self._tag in ("h2", "h3"):
            self._heads[self._tag] += data
        rows = self.tables.get((self._heads["h2"], self._heads["h3"]))
        if rows and rows[-1]:
            rows[-1][-1] += data


# Statistics


def test_interval_by_hand() -> None:
    # Two documents: both drawn from a (1 in 4), from b (1 in 4), one each (1 in 2): means 0, 1 and 4/6.
    found = estimate([0, 0, 1, 1, 1, 1], ["a", "a", "b", "b", "b", "b"])
    assert found == Estimate(pytest.approx(4 / 6), 0.0, 1.0, 6, 2)
    assert estimate([0, 0, 1, 1, 1, 1], list("aabbbb"), confidence=0.4).low == pytest.approx(4 / 6)


def test_interval_against_every_resample() -> None:
    draw = random.Random(1)
    groups = [[draw.random() for _ in range(size)] for size in (1, 2, 5, 3, 1)]
    values = [value for group in groups for value in group]
    found = estimate(values, [str(place) for place, group in enumerate(groups) for _ in group])
    every = []
    for chosen in itertools.product(groups, repeat=len(groups)):
        every.append(fmean(value for group in chosen for value in group))
    means = np.array(every)
    for bound, level in ((found.low, 0.025), (found.high, 0.975)):
        assert (means < bound - 1e-9).mean() <= level + 0.006
        assert (means <= bound + 1e-9).mean() >= level - 0.006


def test_interval_against_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    values = np.random.default_rng(3).gamma(2.0, size=40)
    expected = stats.bootstrap((values,), np.mean, n_resamples=20_000, method="percentile", rng=1).confidence_interval
    found = estimate(list(values), [str(place) for place in range(40)])
    assert (found.low, found.high) == pytest.approx(tuple(expected), abs=0.04 * (expected.high - expected.low))


@given(st.lists(st.tuples(st.floats(-5, 5), st.sampled_from("abcde"), st.floats(0.5, 2)), min_size=1, max_size=25))
def test_interval_properties(items: list[tuple[float, str, float]]) -> None:
    values, documents, weights = zip(*items, strict=True)
    found = estimate(values, documents, weights, resamples=200)
    assert found.mean == pytest.approx(np.average(values, weights=weights), abs=1e-9)
    assert found.has_interval == (len(set(documents)) > 1)
    if found.has_interval:
        assert min(values) - 1e-9 <= found.low <= found.high <= max(values) + 1e-9


def test_differences_are_resampled_by_document(tmp_path: Path) -> None:
    # One long document gains, one loses: 40 items of two documents are two observations.
    rows = []
    for item in range(40):
        document = {"document": "a" if item < 20 else "b"}
        rows.append(row("full", "made_up", item, 0.5, **document))
        rows.append(row("alaya", "made_up", item, 0.6 if item < 20 else 0.45, **document))
    # Items that only one of them answered do not count.
    rows.append(row("alaya", "made_up", 99, 0.0))
    write(keep(tmp_path, rows))
    (line,) = [one for one in table(tmp_path, "headline") if one["system"] == "alaya"]
    assert float(line["difference"]) == pytest.approx(2.5)
    assert float(line["difference_low"]) == pytest.approx(-5.0)
    assert float(line["difference_high"]) == pytest.approx(10.0)
    assert line["mark"] == "="


def test_marks() -> None:
    def found(mean: float, low: float, high: float) -> Estimate:
        return Estimate(mean, low, high, 9, 9)

    assert mark(found(0.01, 0.005, 0.02), True, 0.01) == "="
    assert mark(found(0.2, -0.01, 0.4), True, 0.01) == "="
    assert mark(found(0.2, 0.1, 0.4), True, 0.01) == "+"
    assert mark(found(0.2, 0.1, 0.4), False, 0.01) == "-"
    assert mark(found(-0.2, -0.3, -0.1), True, 0.01) == "-"
    assert mark(found(0.2, math.nan, math.nan), True, 0.01) == "?"
    assert not significant(found(0.2, math.nan, math.nan))


@given(st.lists(st.floats(0, 1), max_size=15), st.sampled_from([0.03, 0.06]))
def test_labels_keep_apart(heights: list[float], step: float) -> None:
    heights = sorted(heights)
    found = spread(heights, step)
    assert len(found) == len(heights)
    assert all(above - below > step - 1e-9 for below, above in itertools.pairwise(found))
    if all(above - below >= step for below, above in itertools.pairwise(heights)):
        assert found == pytest.approx(heights, abs=1e-9)


# The page


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    # One system without one task, one with an item too few.
    return [
        one
        for one in made()
        if (one["system"], one["task"]) != ("topk", "made_up")
        and (one["system"], one["task"], one["length"], one["item"]) != ("alaya", "made_up", 4096, "item 3")
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]]) -> Path:
    common = {"model": "tiny", "length": 4096}
    skipped = [
        common | {"task": "made_up", "system": "topk", "reason": "needs more"},
        common | {"task": "legal_ppl", "system": "vllm", "reason": "no GPU | here"},
        common | {"task": "lost", "system": "*", "reason": "no data"},
        common | {"task": "made_up", "system": "full", "reason": "made up for since"},
    ]
    source = keep(tmp_path_factory.mktemp("results"), rows, skipped)
    output = tmp_path_factory.mktemp("report")
    write(source, output)
    return output


def test_headline_equals_the_rows(folder: Path, rows: list[dict[str, Any]]) -> None:
    values: dict[tuple[str, str, str], dict[str, float]] = defaultdict(dict)
    for one in rows:
        values[str(one["length"]), one["task"], one["system"]][one["item"]] = one["metrics"][METRICS[one["task"]]]
    lines = table(folder, "headline")
    assert {(line["length"], line["task"], line["system"]) for line in lines} == set(values)
    shown = Page((folder / "report.html").read_text(encoding="utf-8")).tables
    text = (folder / "report.md").read_text(encoding="utf-8")
    for line in lines:
        mine = values[line["length"], line["task"], line["system"]]
        full = values[line["length"], line["task"], "full"]
        mean, gap = fmean(mine.values()), fmean(mine[item] - full[item] for item in mine)
        perplexity = line["task"] == "legal_ppl"
        expected = math.exp(mean) if perplexity else 100 * mean
        assert float(line["mean"]) == pytest.approx(expected)
        written = f"{expected:.2f}" if perplexity else f"{expected:.1f}"
        heads, *body = shown["Quality", f"tiny, {int(line['length']) // 1024}K tokens"]
        column = next(
            place for place, head in enumerate(heads) if head.startswith(line["task"].removeprefix("legal_")[:3])
        )
        (cells,) = [cells for cells in body if cells[0] == line["system"]]
        assert cells[column].split()[0] == written
        assert f"| {line['system']} |" in text and f" {written} " in text
        if line["system"] == "full":
            assert line["difference"] == "" and line["mark"] == ""
            continue
        expected = 100 * (math.exp(gap) - 1) if perplexity else 100 * gap
        assert float(line["difference"]) == pytest.approx(expected, abs=1e-9)
        assert float(line["difference_low"]) <= expected <= float(line["difference_high"])
        digits = 2 if perplexity else 1
        written = f"{expected:+.{digits}f}".replace("-", "−") if round(expected, digits) else f"{0:.{digits}f}"
        assert written in cells[column]


def test_means_of_other_tables(folder: Path) -> None:
    (line,) = [x for x in table(folder, "retrieval") if (x["length"], x["system"]) == ("8192", "alaya")]
    assert float(line["attended"]) == 430
    assert float(line["share"]) == pytest.approx(10.75)
    (line,) = [x for x in table(folder, "retrieval") if (x["length"], x["system"]) == ("8192", "full")]
    assert float(line["attended"]) == 4000 and float(line["evidence_recall"]) == 100
    (line,) = [x for x in table(folder, "fidelity") if (x["length"], x["system"]) == ("8192", "topk")]
    assert float(line["kl"]) == pytest.approx(0.001)
    assert float(line["nll_difference"]) == pytest.approx(100 * math.expm1(0.01))
    assert {x["system"] for x in table(folder, "retrieval")} == {"full", "alaya", "topk", "streaming_llm"}
    (line,) = [x for x in table(folder, "cost") if (x["length"], x["system"]) == ("8192", "topk")]
    assert float(line["device_share"]) == pytest.approx(30)


def test_page_refers_to_nothing_outside(folder: Path) -> None:
    text = (folder / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.references
    assert all(value.startswith(("#", "data:image/svg+xml;base64,")) for _, value in page.references)
    anchors = set(re.findall(r'id="([^"]+)"', text))
    assert all(value[1:] in anchors for _, value in page.references if value.startswith("#"))
    assert not page.tags & {"script", "link", "iframe", "object", "embed", "base"}
    assert not re.search(r"https?://|@import|url\(", text)
    assert "a machine & <another>" in page.text


def test_page_ends_with_glossary_and_run(folder: Path) -> None:
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    for words in ("Kullback-Leibler", "resamples of whole documents", '"secret": 17', "abc", "torch 2.x", "run it"):
        assert words in page.text
    for name in re.findall(r"\]\(([^)]+)\)", (folder / "report.md").read_text(encoding="utf-8")):
        assert (folder / name).is_file()


def test_what_did_not_run_is_listed(folder: Path) -> None:
    lines = [(x["system"], x["tasks"], x["lengths"], x["reason"]) for x in table(folder, "absent")]
    assert sorted(lines) == sorted(
        [
            ("topk", "made_up", "4,096", "needs more"),
            ("topk", "made_up", "8,192", "no reason recorded"),
            ("vllm", "legal_ppl", "4,096", "no GPU | here"),
            ("alaya", "made_up", "4,096", "only 11 of 12 items"),
            ("*", "lost", "4,096", "no data"),
        ]
    )
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    assert "no GPU | here" in page.text and "every system" in page.text
    heads, *body = page.tables["Quality", "tiny, 4K tokens"]
    cells = {one[0]: one[heads.index(next(head for head in heads if head.startswith("made")))] for one in body}
    assert "not run" in cells["topk"] and "11 items only" in cells["alaya"]


# Where our system loses


def _losses(tmp_path: Path, scores: dict[str, float]) -> tuple[list[dict[str, str]], str]:
    rows = []
    for item, (system, value) in itertools.product(range(20), scores.items()):
        one = row(system, "made_up", item, value)
        one["retrieval"] = {"attended": ATTENDED.get(system, 4000.0), "context": 4000.0}
        rows.append(one)
    write(keep(tmp_path, rows))
    path = tmp_path / "tables" / "losses.csv"
    text = Page((tmp_path / "report.html").read_text(encoding="utf-8")).text
    return (table(tmp_path, "losses") if path.exists() else []), text


def test_losses_to_full_and_to_cheaper_systems(tmp_path: Path) -> None:
    scores = {"full": 0.9, "alaya": 0.5, "streaming_llm": 0.6, "topk": 0.8, "quest": 0.4}
    lines, text = _losses(tmp_path, scores)
    # top-k is ahead as well, but attends to more tokens.
    assert [(line["behind"], line["metric"]) for line in lines] == [("full", "accuracy"), ("streaming_llm", "accuracy")]
    assert [float(line["difference"]) for line in lines] == pytest.approx([-40, -10])
    assert "Behind full attention: 1" in text


def test_no_losses_is_said(tmp_path: Path) -> None:
    lines, text = _losses(tmp_path, {"full": 0.5, "alaya": 0.5, "streaming_llm": 0.4})
    assert lines == []
    assert re.search(r"by chance alone\.\s+None\.", text)
    _, text = _losses(tmp_path, {"full": 0.5, "topk": 0.5})
    assert "alaya was not run in this folder" in text


# Small and bad folders


def test_one_item(tmp_path: Path) -> None:
    write(keep(tmp_path, [row("full", "made_up", 0, 1.0), row("alaya", "made_up", 0, 0.0)]))
    line = table(tmp_path, "headline")[1]
    assert (float(line["mean"]), line["mean_low"], float(line["difference"]), line["mark"]) == (0, "", -100, "?")
    assert "nan" not in (tmp_path / "report.md").read_text(encoding="utf-8").lower().split()


def test_without_full_nothing_is_compared(tmp_path: Path) -> None:
    write(keep(tmp_path, [row("alaya", "made_up", item, 1.0) for item in range(4)]))
    assert table(tmp_path, "headline")[0]["mark"] == ""
    assert "The results hold no answers of full" in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_only_skipped_systems(tmp_path: Path) -> None:
    write(keep(tmp_path, [], [{"model": "m", "task": "t", "length": 8, "system": "vllm", "reason": "no GPU"}]))
    assert "no GPU" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_earlier_reports_leave_nothing_behind(tmp_path: Path) -> None:
    write(keep(tmp_path, [row(name, "made_up", 0, 1.0) for name in ("full", "alaya")]))
    assert (tmp_path / "tables" / "fidelity.csv").exists() and list((tmp_path / "plots").iterdir())
    write(keep(tmp_path, [row("full", "made_up", 0, 1.0)]))
    assert not (tmp_path / "tables" / "fidelity.csv").exists()
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert all(f"plots/{path.name}" in text for path in (tmp_path / "plots").iterdir())


GOOD = json.dumps(row("full", "made_up", 0, 1.0))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "holds no results: expected lines in rows.jsonl"),
        ([GOOD, '{"model": "ti', GOOD], r"rows\.jsonl, line 2 is not JSON .* Remove the line"),
        ([GOOD, "[1]"], "line 2: expected a JSON object, got list"),
        ([GOOD, GOOD], r"line 2: full already answered item 'item 0' .*line 1"),
        (
            [json.dumps(row("full", "made_up", 0, math.nan))],
            "line 1: metrics are .* expected names with finite numbers",
        ),
        ([json.dumps(row("full", "made_up", 0, 1.0, document=None))], "line 1 lacks document"),
        ([json.dumps(row("full", "made_up", 0, 1.0, length="long"))], "length is 'long'"),
    ],
)
def test_bad_rows_are_refused(tmp_path: Path, lines: list[str], message: str) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    with pytest.raises(ResultsError, match=message):
        load(tmp_path)


def test_missing_headline_metric_is_refused(tmp_path: Path) -> None:
    rows = [row("full", "made_up", 0, 1.0), row("full", "made_up", 1, 1.0, metrics={"other": 1.0})]
    with pytest.raises(ResultsError, match=r"line 2: task made_up is judged by accuracy.*\(other\)"):
        headline(load(keep(tmp_path, rows)).rows)


def test_interrupted_run_is_reported_with_a_note(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(GOOD + '\n{"model": "ti', encoding="utf-8")
    (tmp_path / "rows.1.jsonl").write_text(GOOD.replace("item 0", "item 1") + "\n", encoding="utf-8")
    results = load(tmp_path)
    assert [one.item for one in results.rows] == ["item 1", "item 0"]
    assert any("unfinished" in note for note in results.notes) and any("no run.json" in note for note in results.notes)


def test_command(tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(report)
    missing = CliRunner().invoke(app, [str(tmp_path / "none")])
    assert missing.exit_code == 1 and "is not a folder" in missing.output
    source = keep(tmp_path / "in", [row("full", "made_up", 0, 1.0)])
    assert CliRunner().invoke(app, [str(source), "--output", str(tmp_path / "out")]).exit_code == 0
    assert (tmp_path / "out" / "report.html").is_file() and not (source / "report.html").exists()


# Ablations


def test_ablation(tmp_path: Path) -> None:
    rows, recalls = [], {}
    for beta, local, item in itertools.product((50, 10), (64, 256), range(4)):
        recalls[str(beta), str(local)] = recall = beta / 100 + local / 1000
        retrieval = {"attended": 300.0, "context": 4000.0, "evidence_recall": recall}
        setting = {"query.beta": beta, "window.local": local}
        name = f"query.beta={beta}, window.local={local}"
        rows.append(row(name, "made_up", item, 1.0, setting=setting, retrieval=retrieval))
    write(keep(tmp_path, rows))
    lines = table(tmp_path, "ablation")
    # One system, its settings in order; every cell the mean of its own rows.
    assert {line["system"] for line in lines} == {"alaya"}
    assert [(line["query.beta"], line["window.local"]) for line in lines] == [
        ("10", "64"),
        ("10", "256"),
        ("50", "64"),
        ("50", "256"),
    ]
    for line in lines:
        assert float(line["evidence_recall"]) == pytest.approx(100 * recalls[line["query.beta"], line["window.local"]])
    assert [path.name for path in sorted((tmp_path / "plots").glob("ablation-*"))] == [
        "ablation-evidence_recall-tiny-4096-alaya-0.svg",
        "ablation-kl-tiny-4096-alaya-0.svg",
    ]
    assert "Ablation" in Page((tmp_path / "report.html").read_text(encoding="utf-8")).text
