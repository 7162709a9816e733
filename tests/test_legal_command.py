"""The commands of the evaluation, from the command line to the report, on a small random model."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("datasets", reason="the evaluation needs the extra 'eval'")

from dataclasses import replace

from typer.testing import CliRunner

import eval.ablate
import eval.legal_command
from eval.__main__ import app
from eval.legal.sources import DataError, MissingData
from tests.test_running import TASK, items, model, tokenizer  # noqa: F401  (the fixtures)

FIXED = ["--window", "4,16", "--no-peers", "--no-timing", "--lengths", "220"]


@pytest.fixture
def run(monkeypatch, model, tokenizer, tmp_path):  # noqa: F811
    """Runs a command; ``run.loaded`` counts loaded models."""

    def missing(*_, **__):
        raise MissingData("no such set in the folder. Put it there.")

    def broken(*_, **__):
        raise DataError("cuad.jsonl.gz, line 3 has no 'text'. Download the file again.")

    tasks = {
        "words": replace(TASK, build=lambda *_, items=60, **__: everything()[:items]),
        "absent": replace(TASK, name="absent", build=missing),
        "broken": replace(TASK, name="broken", build=broken),
    }

    def everything():
        return items(2, 2)

    def load(name, device="cpu"):
        call.loaded += 1
        return model, tokenizer

    for module in (eval.legal_command, eval.ablate):
        monkeypatch.setattr(module, "TASKS", tasks)
        monkeypatch.setattr(module, "load", load)
        monkeypatch.setattr(module, "load_tokenizer", lambda name: tokenizer)

    def call(*arguments):
        result = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "400", "TERM": "dumb"})
        call.text = " ".join(result.output.split())
        return result

    call.loaded, call.folder = 0, tmp_path / "results"
    return call


def rows(folder):
    return [json.loads(line) for path in sorted(folder.glob("rows*.jsonl")) for line in path.open()]


def test_from_the_command_to_the_report(run):
    arguments = ["legal", *FIXED, "--tasks", "words,absent", "--systems", "full,offloaded,alaya,topk", "--items", 4]
    result = run(*arguments, "--output", run.folder)
    assert result.exit_code == 0, result.output
    found = rows(run.folder)
    assert sorted({(row["system"], row["item"]) for row in found}) == sorted(
        (system, item.id) for system in ("full", "alaya", "topk") for item in items(2, 2)
    )
    skipped = [json.loads(line) for line in (run.folder / "skipped.jsonl").open()]
    assert {(row["system"], row["task"]) for row in skipped} == {
        ("*", "absent"), ("offloaded", "words"), ("offloaded", "absent"),
    }  # fmt: skip
    made = json.loads((run.folder / "run.json").read_text())
    assert made["config"]["window"] == [4, 16] and made["versions"]["transformers"] and made["hardware"]

    # Again: nothing to do. Two shards with one more system: only that one's rows.
    assert run(*arguments, "--output", run.folder).exit_code == 0
    assert len(rows(run.folder)) == len(found)
    more = [argument if argument != "full,offloaded,alaya,topk" else "alaya,quest" for argument in arguments]
    for shard in ("0/2", "1/2"):
        assert run(*more, "--output", run.folder, "--shard", shard).exit_code == 0
    assert len(rows(run.folder)) == len(found) + 4

    # Without answers, the others' fidelity alone.
    assert run(*more, "--output", run.folder / "quiet", "--answers", "alaya").exit_code == 0
    answered = {row["system"]: bool(row["metrics"]) for row in rows(run.folder / "quiet")}
    assert answered == {"alaya": True, "quest": False}

    pytest.importorskip("jinja2")
    assert run("report", run.folder).exit_code == 0, run.text
    page = (run.folder / "report.html").read_text()
    assert "quest" in page and "offloads from a GPU" in page


def test_a_peer_that_cannot_run_is_reported(run, monkeypatch):
    from eval.peers import kvpress

    def refuse(items, task, name, length, names, results, settings):
        raise kvpress.PeerUnavailable(f"no environment for {settings.device}")

    monkeypatch.setattr(kvpress, "run_kvpress", refuse)
    arguments = [argument for argument in FIXED if argument != "--no-peers"]
    chosen = ["--tasks", "words", "--systems", "full,snapkv", "--items", 1, "--output", run.folder]
    assert run("legal", *arguments, *chosen).exit_code == 0
    (skipped,) = [json.loads(line) for line in (run.folder / "skipped.jsonl").open()]
    assert skipped["system"] == "snapkv" and skipped["reason"] == "no environment for cpu"


def test_a_folder_keeps_its_configuration(run):
    arguments = ["legal", *FIXED, "--tasks", "words", "--systems", "full", "--items", 1, "--output", run.folder]
    assert run(*arguments).exit_code == 0
    result = run(*arguments, "--seed", 5)
    assert result.exit_code == 2 and "another configuration: seed differ(s)" in run.text


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--tasks", "wordz"], "unknown task"),
        (["--systems", "alaya,alya"], "unknown system 'alya'"),
        (["--systems", "full,topk"], "has to be among --systems"),
        (["--shard", "4/4"], "0 <= RANK < COUNT"),
        (["--lengths", "4096"], "takes 2048 tokens, but --lengths asks for 4096"),
        (["--tasks", "broken"], "line 3 has no 'text'"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_cannot_be_run_is_refused(run, arguments, message):
    base = {"--tasks": "words", "--systems": "full,alaya", "--window": "4,16", "--output": str(run.folder)}
    base |= dict(zip(arguments[::2], arguments[1::2], strict=True))
    result = run("legal", "--no-peers", *(part for pair in base.items() for part in pair))
    assert result.exit_code == 2 and message in run.text.replace(" │ │ ", " "), result.output
    assert not list(run.folder.glob("rows*")) and run.loaded <= ("--lengths" in arguments)


def test_an_ablation_from_its_file(run, tmp_path):
    path = tmp_path / "sweep.yaml"
    path.write_text(
        "tasks: [words]\nlengths: [220]\nitems: 2\nwindow: [4, 16]\nsweep: {query.beta: [5, 50], index: [flat, quantized]}\n"
    )
    assert run("ablate", path, "--output", run.folder).exit_code == 0, run.text
    assert len(rows(run.folder)) == 8
    lines = (run.folder / "tidy.csv").read_text().splitlines()
    assert any(",1,evidence_recall," in line for line in lines) and any(",whole,kl," in line for line in lines)


@pytest.mark.parametrize(
    "text, message",
    [
        ("tasks: [words]\nsweep: {query.betta: [1]}", "betta"),
        ("sweep: {query.beta: 5}", "lists of values"),
        ("swep: {}", "unknown keys ['swep']"),
        ("tasks: [nothing]\nsweep: {query.beta: [5]}", "unknown tasks"),
    ],
)
def test_a_wrong_ablation_is_refused(run, tmp_path, text, message):
    path = tmp_path / "sweep.yaml"
    path.write_text(text)
    result = run("ablate", path, "--output", run.folder)
    assert result.exit_code == 2 and message in run.text, result.output
    assert run.loaded == 0


FILE = """
models:
  small: {pretrained: nowhere, shape: tiny, rope: {kind: yarn, factor: 4}}
legal: {model: small, tasks: [words], lengths: [220], window: [4, 16], items: 3, systems: [full, alaya]}
"""


def test_a_file_names_models_and_options(run, tmp_path):
    """The command line has the last word, and random weights need no files."""
    path = tmp_path / "models.yaml"
    path.write_text(FILE)
    given = ["legal", "--config", path, "--no-peers", "--random-weights", "--items", 1, "--output", run.folder]
    assert run(*given).exit_code == 0, run.text
    assert sorted((row["model"], row["system"], row["item"]) for row in rows(run.folder)) == [
        ("small", "alaya", "0/0"), ("small", "full", "0/0"),
    ]  # fmt: skip
    assert run.loaded == 0
    made = json.loads((run.folder / "run.json").read_text())["config"]
    assert made["random_weights"] and made["window"] == [4, 16] and made["items"] == 1


@pytest.mark.parametrize(
    "text, arguments, message",
    [
        ("legal: {}", [], "needs 'models'"),
        ("models: {a: {shape: tiny}}", [], "expected 'pretrained'"),
        ("models: {a: {pretrained: b, shape: huge}}", [], "shapes: llama-3-8b"),
        ("models: {}\nlegal: {modle: a}", [], "unknown options ['modle']"),
        ("models: {a: {pretrained: b}}\nlegal: {model: a, tasks: words}", ["--random-weights"], "no shape"),
    ],
)
def test_a_wrong_file_is_refused(run, tmp_path, text, arguments, message):
    path = tmp_path / "models.yaml"
    path.write_text(text)
    result = run("legal", "--config", path, "--output", run.folder, *arguments)
    assert result.exit_code == 2 and message in run.text.replace(" │ │ ", " "), result.output
    assert run("legal", "--device", "auto", "--output", run.folder).exit_code == 2


def test_the_published_file(run):
    """Its options are those of the command and its models extend what they are to."""
    from pathlib import Path

    from eval.models import read_models
    from eval.random_model import SHAPES

    path = Path(__file__).parents[1] / "configs" / "llama3_70b.yaml"
    entries, options = read_models(path, "legal")
    assert options["model"] in entries and all(entry.shape in SHAPES for entry in entries.values())
    assert entries["llama-3-70b-8k"].rope["factor"] * 8192 >= max(options["lengths"])
    chosen = [
        "--random-weights",
        "--shape",
        "tiny",
        "--device",
        "cpu",
        "--tasks",
        "words",
        "--items",
        1,
        "--lengths",
        220,
    ]
    systems = ["--systems", "full,alaya", "--no-peers", "--window", "4,16", "--no-chat", "--output", run.folder]
    assert run("legal", "--config", path, *chosen, *systems).exit_code == 0, run.text
    assert {row["model"] for row in rows(run.folder)} == {"llama-3.3-70b"}


def test_two_processes_share_the_work_and_the_first_one_reports(tmp_path):
    """As `accelerate launch` starts them; a folder each, as on machines without a common disk."""
    import os
    import subprocess
    import sys

    from tests.test_parallel import _free_port

    pytest.importorskip("jinja2")
    port = _free_port()

    def start(rank):
        about = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = {**os.environ, **{name: str(value) for name, value in about.items()}}
        command = [sys.executable, "-m", "tests.legal_process", str(tmp_path / str(rank))]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    outs = [process.communicate(timeout=300)[0] for process in [start(0), start(1)]]
    assert "8 rows of all processes" in outs[0] and "report" in outs[0], outs
    assert "results:" not in outs[1]
    assert len(rows(tmp_path / "0")) == 8 and len(rows(tmp_path / "1")) == 4
    assert len({(row["item"], row["system"]) for row in rows(tmp_path / "0")}) == 8
    assert (tmp_path / "0" / "report.html").exists()
