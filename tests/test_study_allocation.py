"""The study of allocation and prefill, end to end at a tiny shape."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("datasets", reason="the evaluation needs the extra 'eval'")

from typer.testing import CliRunner

from alaya_hf.errors import ConfigError
from eval.__main__ import app
from eval.studies.allocation_bsfa_70b.answer import (
    answers,
    of_allocation,
    of_bsfa,
    of_memory,
    of_scaling,
    plausible,
    strategies,
    wholest,
)
from eval.studies.allocation_bsfa_70b.page import page
from eval.studies.cells import Cells

GRID = ["--shape", "tiny", "--device", "cpu", "--layers", "0", "--few", "1", "--contexts", "512,700", "--chunk", "256",
        "--new", "8", "--documents", "4", "--allocators", "paged,segment", "--k", "2", "--devices", "1", "--device-memory",
        "64MiB", "--host-memory", "600KiB"]  # fmt: skip


def _rows(folder):
    return [json.loads(line) for line in (folder / "rows.jsonl").open()]


def _run(folder, *more):
    done = CliRunner().invoke(app, ["study", "allocation-bsfa-70b", *GRID, "--output", str(folder), *more])
    assert done.exit_code == 0, done.output
    return _rows(folder)


def test_from_the_command_to_the_page(tmp_path):
    """Every cell of the grid, once, most worthwhile first; what cannot run says why; a second run measures nothing."""
    pytest.importorskip("triton")  # the plan is one for GPUs
    stopped = _run(tmp_path, "--seconds", "1e-9")
    assert stopped and all(row["later"] and "no time left" in row["not run"] for row in stopped)
    assert "## Not run" in (tmp_path / "page.md").read_text()
    found = _run(tmp_path)[len(stopped) :]
    assert len(found) == len(stopped)
    assert {row["settings"]["system"] for row in found if "not run" in row} == {"offloaded"}
    order = [
        (row["settings"]["part"], row["settings"]["context"], row["settings"]["batch"])
        for row in found
        if "layers" in row["settings"]
    ]
    assert order[0] == ("decode", 512, 1) and order[-1][0] == "prefill" and order[-1][1:] == (700, 2)
    assert order.index(("prefill", 512, 1)) < order.index(("decode", 512, 2)) < order.index(("decode", 700, 1))
    for row in found:
        limits = row["settings"]["part"] == "limits"
        assert not limits or (row["alaya rows"] == 2 and row["resident rows"] > 0)
        if row["settings"]["part"] == "prefill":
            assert row["planned GB"] > 0 and row["first token s"] == pytest.approx(row["measured s"])
    assert _run(tmp_path) == [*stopped, *found]
    text = " ".join((tmp_path / "page.md").read_text().split())
    assert "says anything about the quality of an answer" in text and "needle multikey" in text
    assert len((tmp_path / "cells.csv").read_text().splitlines()) == 1 + len(found)


def test_few_layers_are_brought_to_all_in_a_straight_line(tmp_path, monkeypatch):
    """What every step costs once is counted once."""
    from eval.studies.allocation_bsfa_70b.measure import Bench

    bench = Bench("llama-3-70b", 4, "cpu", 256, 8, 2, tmp_path, {0: "1GiB"}, 1 << 30, 1 << 30)
    seen = []
    monkeypatch.setattr(
        bench, "_decode", lambda c, b, s, layers, a: seen.append(layers) or {"measured ms": 0.7 + 0.5 * layers}
    )
    row = bench.decode(1024, 2)
    assert seen == [2, 4] and row["measured ms"] == 2.7
    assert row["ms per token"] == pytest.approx(0.7 + 0.5 * 80) and row["tokens/s"] == pytest.approx(2000 / 40.7)


def test_layers_that_share_weights_are_layers():
    """The same answers as a model whose layers hold copies of these weights, each layer with keys of its own."""
    import torch

    from eval.random_model import random_model

    shared, apart = (random_model("tiny", "cpu", torch.float32, 4, shared=how) for how in (True, False))
    apart.load_state_dict(shared.state_dict())
    ids = torch.randint(1, 128, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(*(model.generate(ids, max_new_tokens=8, do_sample=False) for model in (shared, apart)))
    held = [sum(p.numel() for p in model.model.layers.parameters()) for model in (shared, apart)]
    assert held[1] == 4 * held[0] and len(shared.model.layers) == 4


def test_a_small_machine_runs_some_of_the_layers_of_a_large_batch(tmp_path):
    from eval.studies.allocation_bsfa_70b.measure import Bench

    row = 131072 * 80 * 2 * 8 * 128 * 2  # bytes of a row of all layers
    for rows, here, layers in ((1, 2 * row, 80), (4, 2 * row, 64), (8, row, 16), (16, row // 64, 1)):
        bench = Bench("llama-3-70b", 0, "cuda", 256, 8, 2, tmp_path, {0: "1GiB"}, 1 << 30, here, shared=True)
        found = bench.fitting(131072, rows, 80)
        assert found == pytest.approx(layers, abs=8) and found in (1, 80, *range(4, 80, 4))
        assert found == 1 or found * rows * row / 80 * 0.508 <= here


def test_of_cells_that_differ_in_layers_the_most_stand():
    few = _row("prefill", prefill="dense", chunk=4, layers=4, found={"first token s": 11.0})
    whole = _row("prefill", prefill="dense", chunk=4, weights="shared", found={"first token s": 10.0})
    refused = _row("prefill", prefill="dense", chunk=4, layers=64, found={"not run": "no room"})
    assert wholest([few, refused, whole]) == [refused, whole]
    assert wholest([few]) == [few]
    (sentence,) = of_scaling([few, whole])
    assert "all 32 layers take 10 s; 4 of them, in proportion, 11 s, 1.10 times as long" in sentence
    assert sentence in page([few, whole]) and "shared" in page([few, whole])


def _row(part, batch=1, allocation=None, found=None, **more):
    settings = {
        "part": part,
        "shape": "llama-3-8b",
        "device": "a GPU",
        "context": 8,
        "batch": batch,
        "layers": 32,
        **more,
    }
    return {"settings": settings | {"allocation": allocation}, "seconds": 1.0, **(found or {})}


def test_bounds_and_sentences_follow_from_the_cells():
    ours = {"ms per token": 10.0, "tokens/s": 100.0, "device share": 0.25}
    rows = [
        _row("limits", found={"alaya rows": 6, "resident rows": 2}),
        _row("decode", system="alaya", found=ours),
        _row("decode", system="alaya", batch=6, found={"ms per token": 20.0, "tokens/s": 300.0, "device share": 0.24}),
        _row(
            "decode", system="alaya", batch=9, found={"ms per token": 1.0, "tokens/s": 9000.0}
        ),  # more than is planned
        _row("decode", system="resident", found={"ms per token": 9.0, "tokens/s": 111.0}),
        _row("decode", system="full", found={"ms per token": 90.0, "tokens/s": 11.0}),
        # One row more than planned, over all layers: it ran, so it counts.
        _row("decode", system="resident", batch=3, found={"ms per token": 12.0, "tokens/s": 250.0}),
        _row("decode", system="offloaded", found={"not run": "no room"}),
        _row("prefill", prefill="dense", chunk=4, found={"first token s": 3.0, "planned / measured": 1.2}),
        _row("prefill", prefill="bsfa", chunk=4, k=64, found={"first token s": 2.0, "skipped tiles": 0.5}),
        _row("decode", system="alaya", allocation="paged", found={"measured ms": 11.0, "ms per token": 88.0}),
        _row("decode", system="alaya", allocation="segment", found={"measured ms": 10.0, "ms per token": 90.0}),
        # A line through two numbers of layers that falls: noise, not a time.
        _row("decode", system="static_compiled", layers=4, found={"measured ms": 5.0, "ms per token": -3.0}),
        _row(
            "allocation", allocation="paged", found={"held / needed": 1.0, "calls per transfer": 1000.0, "refused": 0}
        ),
        _row(
            "allocation", allocation="segment", found={"held / needed": 2.5, "calls per transfer": 10.0, "refused": 3}
        ),
    ]
    found = {line["what"]: (line["measured"], line["holds"]) for line in answers(plausible(rows))}
    assert found == {
        "time per token / resident": (pytest.approx(10 / 9), "yes"),
        "offloaded DynamicCache / time per token": (None, "not measured"),
        "largest batch / resident's": (2.0, "yes"),
        "tokens/s / resident's best": (pytest.approx(1.2), "no"),
        "cache on the device, % of the full KV": (25.0, "no"),
        "planned / measured peak of a prefill": (1.2, "no"),
    }
    (times,), (memory,), (bsfa,) = of_allocation(rows), of_memory(rows), of_bsfa(rows)
    assert "`segment` 10 to `paged` 11 ms, 10.0 % apart" in times
    assert "`paged` 1.00, `segment` 2.50" in memory and "100 times fewer" in memory and "`segment` 3;" in memory
    assert "2 s instead of 3 s, 1.50 times as fast with 50 % of the tiles skipped" in bsfa
    lines = {line["strategy"]: line for line in strategies(rows)}
    assert {name: line["ms per token"] for name, line in lines.items()} == {"paged": 88.0, "segment": 90.0}
    assert lines["segment"]["memory held / needed"] == 2.5 and lines["paged"]["first token s"] is None
    # Four layers of one strategy beside all of the others' say nothing.
    few = _row(
        "decode", system="alaya", allocation="dynamic", layers=4, found={"measured ms": 1.0, "ms per token": 2.0}
    )
    assert of_allocation([*rows, few]) == [times] and strategies([*rows, few]) == strategies(rows)
    text = page(rows)
    assert (
        "3 of 6 bounds hold" not in text
        and "2 of 6 bounds hold, 3 do not, 1 not measured" in text
        and "no room" in text
    )
    assert "Nothing has been measured yet" in page([])


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
