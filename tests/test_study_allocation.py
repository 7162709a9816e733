"""The study of allocation and prefill, end to end at a tiny shape."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("datasets", reason="the evaluation needs the extra 'eval'")

from typer.testing import CliRunner

from alaya_hf.errors import ConfigError
from eval.__main__ import app
from eval.studies.allocation_bsfa_70b.page import table
from eval.studies.cells import Cells

GRID = ["--shape", "tiny", "--device", "cpu", "--layers", "1", "--contexts", "512,700", "--batches", "1,2", "--chunk", "256",
        "--new", "8", "--documents", "4", "--allocators", "paged,contiguous", "--k", "2"]  # fmt: skip


def _rows(folder):
    return [json.loads(line) for line in (folder / "rows.jsonl").open()]


def test_from_the_command_to_the_page(tmp_path):
    """Every cell of the grid, once; what does not fit says why; a second run measures nothing."""
    pytest.importorskip("triton")  # the plan is one for GPUs
    command = ["study", "allocation-bsfa-70b", *GRID, "--devices", "1", "--output", str(tmp_path)]
    done = CliRunner().invoke(app, [*command, "--device-memory", "1GiB"])
    assert done.exit_code == 0, done.output
    found = _rows(tmp_path)
    assert len(found) == 2 * 2 * (1 + 2 + 1 + 4) and not any("not run" in row for row in found), [
        row for row in found if "not run" in row
    ]
    # One of two layers was timed.
    for row in found:
        if row["settings"]["part"] == "prefill":
            assert row["time to first token s"] == pytest.approx(2 * row["measured s"])
    assert CliRunner().invoke(app, [*command, "--device-memory", "1GiB"]).exit_code == 0
    assert len(_rows(tmp_path)) == len(found)
    text = " ".join((tmp_path / "page.md").read_text().split())
    assert "no number here says anything about the quality" in text and "## Not run" not in text
    assert CliRunner().invoke(app, [*command, "--device-memory", "1MiB"]).exit_code == 0
    assert len(_rows(tmp_path)) == len(found) + 4
    text = (tmp_path / "page.md").read_text()
    assert "## Not run" in text and "are available" in text


def _settings(part, context=8, batch=1, **more):
    return {"part": part, "context": context, "batch": batch, **more}


def test_lines_are_joined_from_their_cells():
    rows = [
        {"settings": _settings("prefill", prefill="dense"), "time to first token s": 3.0},
        {"settings": _settings("prefill", batch=2, prefill="dense"), "not run": "no room"},
        {"settings": _settings("decode"), "ms per token": 10.0},
        {"settings": _settings("decode", batch=2), "ms per token": 16.0},
        {"settings": _settings("plan"), "peak device GB": 5.0, "host GB": 1.0},
        {"settings": _settings("plan", batch=2), "not run": "too large"},
        {"settings": _settings("allocation", allocation="paged"), "fragmentation": 0.5},
    ]
    one, two = table(rows)
    assert (one["first token s"], one["ms/token"], one["device GB"], one["fragmentation"]) == (3.0, 10.0, 5.0, 0.5)
    # Two rows do not fit: the throughput is that of one.
    assert one["largest batch"] == two["largest batch"] == 1 and two["tokens/s, largest batch"] == 100.0
    assert two["first token s"] is None and two["device GB"] is None


def test_cells_say_why_and_are_measured_again_on_request(tmp_path):
    def refuse():
        raise ConfigError("not on this device")

    def exhausted():
        raise MemoryError

    for again, run, wanted in (
        (False, refuse, "not on this device"),
        (False, lambda: {"ms": 1}, "not on this device"),
        (True, exhausted, "out of memory: no room"),
        (True, lambda: {"ms": 1}, None),
        (True, refuse, None),
    ):
        row = Cells(tmp_path, again).measure({"b": 1, "a": 2}, run)
        assert row.get("not run") == wanted and row["settings"] == {"a": 2, "b": 1}
    with pytest.raises(RuntimeError):
        Cells(tmp_path).measure({"a": 1}, lambda: (_ for _ in ()).throw(RuntimeError("a mistake")))
