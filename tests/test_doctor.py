"""``alaya-hf doctor`` on whatever machine this is, and what it makes of a kernel that fails."""

from __future__ import annotations

import json

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from alaya_hf.cli import app, machine
from alaya_hf.cli.doctor import print_report


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(machine, "SAMPLE", 8 << 20)


def run(*arguments):
    return CliRunner().invoke(app, ["doctor", *arguments], env={"COLUMNS": "160", "NO_COLOR": "1"})


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without CUDA does")
def test_without_cuda_one_screen_says_so():
    result = run()
    assert result.exit_code == 0, result.output
    assert len(result.output.splitlines()) <= 40
    for text in (f"torch {torch.__version__}"[:9], "GB/s", "s per GiB", "torch flash (CPU)", "not run: no CUDA device"):
        assert text in result.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without CUDA does")
def test_plain_data():
    result = run("--json")
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    assert set(report) == {"versions", "host", "pool", "attention", "devices", "kernels"}
    assert report["devices"] == [] and report["kernels"] == machine.NO_CUDA
    assert report["versions"]["python"] and report["host"]["cores"] >= 1
    assert 0 < report["host"]["available"] <= report["host"]["memory"] and report["host"]["read_gb_s"] > 0
    assert report["pool"]["seconds_per_gib"] > 0 and report["pool"]["pinned"] is False


DEVICE = {
    "index": 0, "name": "Some GPU", "capability": "9.0", "memory": 80 << 30, "free": 79 << 30, "copy_gb_s": 3000.0,
    "to_device_gb_s": 53.0, "to_host_gb_s": 52.0, "attention": {"prefill": "flash-attn 3"},
    "attention_checks": {"flash-attn 3": "ok", "flash-attn 2": "not there: no module"}, "nvrtc": True,
    "kernels": {"cut": "ok, 1.0 s with compiling", "merge": "failed: AssertionError: no message"},
}  # fmt: skip


def test_a_failed_check_is_shown_and_fails_the_command(monkeypatch):
    report = {**machine.examine(), "devices": [DEVICE]}
    monkeypatch.setattr(machine, "examine", lambda: report)
    result = run()
    assert result.exit_code == 1
    assert "agree with their references: cut" in result.output and "merge: failed" in result.output
    assert "flash-attn 2" not in result.output
    assert machine.failures(report) == ["cuda:0 kernels merge: failed: AssertionError: no message"]


@pytest.mark.gpu
def test_on_a_gpu():
    report = machine.examine()
    print_report(report, Console(width=160))
    assert machine.failures(report) == []
    device = report["devices"][0]
    assert set(device["kernels"]) > {"step"} and all(result.startswith("ok") for result in device["kernels"].values())
    assert "ok" in device["attention_checks"].values()
    assert device["to_device_gb_s"] > 1 and device["copy_gb_s"] > 10
    assert report["pool"]["pinned"] is True
