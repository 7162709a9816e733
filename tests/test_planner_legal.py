"""Scores of legal tasks against time: the judgement on made-up rows, and every stage on a small random model."""

from __future__ import annotations

import copy
import csv
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import eval.planner_command
import eval.planner_legal
import eval.planner_pareto
from alaya_hf import AlayaCache, AlayaConfig, AlayaLayer
from alaya_hf.config import WindowConfig
from alaya_hf.engine.device.plan import check_device, device_plan
from alaya_hf.errors import ConfigError
from alaya_hf.index import Quantized
from alaya_hf.planner import ModelShape
from alaya_hf.planner.calibration import shipped_calibration
from eval.__main__ import app
from eval.models import in_bfloat16
from eval.planner_legal import CHOSEN, judged, on_device, selection, systems_of, verdict
from eval.planner_pareto import Track, fixed
from eval.running.answer import longest_pass
from eval.running.run import Runner
from eval.running.store import Results
from eval.systems import Context, System
from tests.test_running import TASK, items, model, tokenizer, words  # noqa: F401  (the fixtures)

ON_GPU = ModelShape(2, 8, 2, 64, torch.bfloat16, "cuda")


def made_up(scores: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    """Rows of systems that score the same on every item of a task."""
    return [
        {
            "system": system, "task": task, "item": str(i), "document": str(i // 2),
            "metrics": {"length": score + 0.01 * (i % 3)},
            "fidelity": {"kl": 1 - score, "top1": score},
        }
        for system, own in scores.items()
        for task, score in own.items()
        for i in range(9 if task == "long" else 3)
    ]  # fmt: skip


def steps(seconds: float) -> Track:
    return Track(seconds=[seconds + 0.0001 * (i % 5) for i in range(20)], engine="host")


def test_who_is_below_the_front() -> None:
    scores = {
        "beta 10, window 64, flat": {"long": 0.5, "short": 0.7},
        "full": {"long": 0.8, "short": 0.8},
        "planner, KL 1": {"long": 0.4, "short": 0.7},
        "planner, KL 2": {"long": 0.6, "short": 0.7},
        "planner, KL 3": {"long": 0.8, "short": 0.79},
        "planner, KL 4": {"long": 0.8, "short": 0.8},
    }
    times = dict(zip(scores, (0.010, 0.020, 0.011, 0.0105, 0.02005, 0.021), strict=True))
    tasks = [replace(TASK, name=name) for name in ("long", "short")]
    found = {name: steps(seconds) for name, seconds in times.items()}
    rows, counts = judged(made_up(scores), found, tasks)
    assert counts == {"long": 9, "short": 3}
    by = {row["configuration"]: row for row in rows}
    # Tasks weigh the same, whatever their numbers of items.
    assert by["full"]["score"] == pytest.approx(81) and by["full"]["KL"] == pytest.approx(0.2)
    assert by["full"]["long"] == pytest.approx(81) and by["full"]["same top token %"] == pytest.approx(80)
    assert by["planner, KL 1"]["beaten by"] == by["planner, KL 1"]["surely"] == "beta 10, window 64, flat"
    assert by["planner, KL 2"]["on the front"] and not by["planner, KL 2"]["surely"]
    assert by["planner, KL 3"]["beaten by"] == "full"
    assert by["planner, KL 1"]["surely, by document"] == "beta 10, window 64, flat"
    assert "of 4 settings" in verdict(rows) and "higher): 2 (KL 1; KL 3)" in verdict(rows)
    # As good as a faster one is not beaten, and not on the front.
    assert by["planner, KL 4"]["equalled by"] == "full" and not by["planner, KL 4"]["beaten by"]
    assert not by["planner, KL 4"]["on the front"] and "in score: 1 (KL 4)" in verdict(rows)
    assert {row["configuration"] for row in selection(rows)} == set(scores)


def test_chance_is_not_sure() -> None:
    """A mean that is higher by one item of many, and a time that is now less and now more."""
    rows = made_up({"beta 1, window 2, flat": {"long": 0.5}, "planner, KL 1": {"long": 0.5}})
    rows[0]["metrics"] = {"length": 0.9}
    found = {"beta 1, window 2, flat": steps(0.01), "planner, KL 1": steps(0.0102)}
    (_, ours), _ = judged(rows, found, [replace(TASK, name="long")])
    assert ours["beaten by"] and not ours["surely"]


def test_only_items_that_all_have_answered_count() -> None:
    rows = made_up({"full": {"long": 0.5}, "planner, KL 1": {"long": 0.5}})
    found = {"full": steps(0.01), "planner, KL 1": steps(0.02), "never answered": steps(0.03)}
    table, counts = judged(rows[4:], found, [replace(TASK, name="long")])
    assert counts == {"long": 5} and len(table) == 2
    assert judged(rows[:9], {"planner, KL 1": steps(0.02)}, [TASK]) == ([], {})


@pytest.mark.parametrize("name, settings", fixed().items(), ids=lambda value: value if isinstance(value, str) else "")
def test_the_device_engine_drives_what_it_serves(name: str, settings: AlayaConfig) -> None:
    pytest.importorskip("triton")
    moved = on_device(settings, ON_GPU)
    margin = {"index": Quantized(settings.index.bits, 0.0)} if isinstance(settings.index, Quantized) else {}
    asked = settings.replace(engine="device", **margin)
    try:
        device_plan(asked, 0)
    except ConfigError:
        assert moved == settings
    else:
        check_device(moved)
        assert moved == asked
    served = name in ("alaya", "alaya_block_means", "infllm") or name.endswith("quantized")
    assert (moved.engine == "device") == served


def test_other_models_stay_on_the_host() -> None:
    for shape in (replace(ON_GPU, device="cpu"), replace(ON_GPU, dtype=torch.float32), replace(ON_GPU, head_dim=40)):
        systems = systems_of(shape, ["quantized"], [0.9], [0.1])
        assert {system.settings.engine for system in systems if system.settings is not None} == {"host"}
    systems = {system.name: system.settings for system in systems_of(ON_GPU, ["quantized"], [0.9], [0.1])}
    assert systems["full"] is None and systems["preset full"].engine == "host"
    assert "engine" not in systems["planner, recovery 0.9"].given


@pytest.fixture
def run(monkeypatch, model, tokenizer, tmp_path):  # noqa: F811
    """Runs the command on two tasks of words, five fixed configurations and two of the planner's."""
    few = {
        "beta 5, window 16, quantized": AlayaConfig(query={"kind": "dipr", "beta": 5}, window=(4, 16), min_context=0),
        "beta 5, window 32, quantized": AlayaConfig(query={"kind": "dipr", "beta": 5}, window=(4, 32), min_context=0),
        "full": AlayaConfig.preset("full").replace(min_context=0, window=(4, 16)),
    }
    tasks = {
        "words": replace(TASK, build=lambda *_, **__: items(2, 2)),
        "more": replace(TASK, name="more", build=lambda *_, **__: items(2, 1)),
        "lower": replace(TASK, name="lower", higher_is_better=False),
    }
    ids = tokenizer(words(200, 3)).input_ids
    monkeypatch.setattr(eval.planner_legal, "fixed", lambda indexes: few)
    monkeypatch.setattr(eval.planner_legal, "TASKS", tasks)
    monkeypatch.setattr(eval.planner_legal, "_WINDOW", (4, 16))
    monkeypatch.setattr(eval.planner_legal, "long_contracts", lambda *_: [("a", ids)])
    monkeypatch.setattr(eval.planner_pareto, "calibrate", lambda shape: shipped_calibration())
    monkeypatch.setenv("ALAYA_HF_CALIBRATION", "")

    def load(name, device):
        call.loaded += 1
        return model, tokenizer

    monkeypatch.setattr(eval.planner_command, "load", load)

    def call(*arguments):
        given = ["planner", "--part", "legal", "--tasks", "words,more", "--tokens", 200, "--data-dir", tmp_path]
        given += ["--skip", 0, "--documents", 1, "--steps", 5, "--recoveries", 0.9, "--kls", 0.01]
        result = CliRunner().invoke(
            app, [str(a) for a in (*given, "--output", call.folder, *arguments)], env={"COLUMNS": "400", "TERM": "dumb"}
        )
        call.text = " ".join(result.output.split())
        return result

    call.loaded, call.folder = 0, tmp_path / "results"
    return call


NAMES = [
    "full", "beta 5, window 16, quantized", "beta 5, window 32, quantized", "preset full", "planner, recovery 0.9",
    "planner, KL 0.01",
]  # fmt: skip


def test_from_times_to_the_verdict(run) -> None:
    assert run("--shard", "0/2").exit_code == 2 and "--stage times" in run.text
    assert run("--stage", "judge").exit_code == 2 and "no times" in run.text
    assert run("--stage", "times").exit_code == 0, run.text
    held = json.loads((run.folder / "times.json").read_text())
    assert {name: len(track["seconds"]) for name, track in held["tracks"].items()} == dict.fromkeys(NAMES, 3)
    assert held["tracks"]["full"]["engine"] == "stock" and max(held["tracks"]["full"]["kl"]) < 1e-4
    assert run("--stage", "judge").exit_code == 2 and "no item" in run.text
    for shard in ("0/2", "1/2"):
        assert run("--shard", shard).exit_code == 0, run.text
    assert not (run.folder / "legal.csv").exists() and not (run.folder / "rows.jsonl").exists()
    found = [json.loads(line) for path in run.folder.glob("rows.*.jsonl") for line in path.open()]
    assert sorted({row["system"] for row in found}) == sorted(NAMES) and len(found) == 6 * len(NAMES)
    assert {row["settings"]["query"]["kind"] for row in found if row["system"].startswith("beta")} == {"dipr"}

    # Nothing is left to do, and a judgement alone takes no model.
    before = (run.folder / "times.json").read_bytes()
    assert run().exit_code == 0, run.text
    assert (run.folder / "times.json").read_bytes() == before and not (run.folder / "rows.jsonl").exists()
    loaded = run.loaded
    assert run("--stage", "judge").exit_code == 0 and run.loaded == loaded
    assert "of 2 settings of the planner" in run.text and "4 of words, 2 of more" in run.text
    with (run.folder / "legal.csv").open() as file:
        rows = {row["configuration"]: row for row in csv.DictReader(file)}
    assert set(rows) == set(NAMES) and float(rows["full"]["KL"]) == 0
    assert float(rows["preset full"]["score"]) == float(rows["full"]["score"])
    assert (run.folder / "legal.png").stat().st_size


def test_the_same_by_kl(run, monkeypatch) -> None:
    for name in ("fixed", "long_contracts"):
        monkeypatch.setattr(eval.planner_command, name, getattr(eval.planner_legal, name))
    assert run("--part", "pareto").exit_code == 0, run.text
    with (run.folder / "pareto.csv").open() as file:
        rows = {row["configuration"]: row for row in csv.DictReader(file)}
    # Transformers' own cache is not among them: full is the preset.
    assert set(rows) == {*NAMES} - {"preset full"} and abs(float(rows["full"]["KL"])) < 1e-4
    assert float(rows["full"]["retrieved"]) > 0 and rows["full"]["engine"] == "host"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--tasks", "wordz"], "unknown tasks ['wordz']"),
        (["--tasks", "lower"], "less is better"),
        (["--stage", "time"], "all, times, scores, judge"),
        (["--tokens", "4096"], "takes 2048 tokens"),
    ],
)
def test_what_cannot_be_run_is_refused(run, arguments: list[str], message: str) -> None:
    assert run(*arguments).exit_code == 2 and message in run.text


def test_caches_that_retrieve_for_few_tokens_are_asked_by_as_few(model, tokenizer, tmp_path) -> None:  # noqa: F811
    """Longer passes would be attended exactly, which no decode step is."""
    narrow = AlayaConfig(query={"kind": "topk", "k": 1}, index="flat", residual="none", window=(2, 4), min_context=0)
    systems = [System(str(most), narrow.replace(max_sparse_queries=most)) for most in (64, 2, 1)]
    results = Results(tmp_path)
    Runner(model, tokenizer, "tiny", systems, results, (2, 4), timing=False).run(TASK, 200, items(1, 1))
    kl = {row["system"]: row["fidelity"]["kl"] for row in results.rows()}
    assert kl["64"] > 1e-3
    assert [kl["2"], kl["1"]] == pytest.approx([kl["64"]] * 2, rel=1e-3)
    cache = AlayaCache(narrow)
    cache.layers = [AlayaLayer(AlayaConfig.preset("infllm").replace(engine="device"))]
    assert longest_pass(cache) == 1


def test_weights_alone_are_rounded(model) -> None:  # noqa: F811
    half = in_bfloat16(copy.deepcopy(model))
    assert {weight.dtype for weight in half.parameters()} == {torch.bfloat16}
    assert torch.equal(half.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)


def test_contexts_keep_every_window_of_their_systems(model, tokenizer) -> None:  # noqa: F811
    ids = tokenizer(words(60, 1), return_tensors="pt").input_ids
    windows = [WindowConfig(2, 4 + i) for i in range(6)]
    systems = [System(str(i), AlayaConfig(window=window, min_context=0)) for i, window in enumerate(windows)]
    context = Context.for_systems(model, ids, (2, 4), systems)
    for system in systems:
        system.cache(context)
    assert len(context._forks) == 6


def test_default_tasks_need_no_package_of_other_tasks() -> None:
    """Where the extra 'eval' is not installed, the command starts and its tasks are there and score."""
    code = f"""
import sys

sys.modules.update(dict.fromkeys(["datasets", "lm_eval", "pyarrow", "rouge_score", "nltk"]))  # None: not there
import eval.__main__
from eval.legal import TASKS, Item, Output
for name in {CHOSEN!r}:
    task = TASKS[name]
    item = Item("a", "a", "", "", ("Entailment",), choices=("Entailment", "No"), labels={{"gold": 0, "values": ["1"]}})
    score = task.score(item, Output(text="1", logprobs=(-1.0, -2.0)))
    assert task.metric in score and task.higher_is_better, name
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
