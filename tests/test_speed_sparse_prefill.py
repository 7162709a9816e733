"""Timing of sparse prefill: the data it is timed on, and the command."""

from __future__ import annotations

import csv
import math

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

pytest.importorskip("eval.synthetic_prefill", reason="needs a checkout")
from eval.speed_sparse_prefill import captured
from eval.synthetic_prefill import real_like_prompt

SHAPE = (4, 2, 64)


@pytest.mark.parametrize("share", [0.275, 0.6])
def test_as_many_tiles_can_be_skipped_as_was_asked_for(share):
    """By the definition, tile by tile: the scores of a tile against everything that a row has seen before."""
    n, scaling = 1024, 1 / 8
    q, k, _ = real_like_prompt(*SHAPE, n, "cpu", torch.float32, share)
    logits = (q[0] @ k[0].repeat_interleave(2, 0).transpose(1, 2)) * scaling
    logits = logits.masked_fill(~torch.ones(n, n).tril().bool(), -math.inf)
    best = logits.view(4, n, n // 64, 64).amax(-1)
    skipped, tiles = 0, 0
    for tile in range(n // 128):
        rows = best[:, tile * 128 : (tile + 1) * 128]
        seen = rows[..., 2 * tile :].amax(-1)
        for j in range(2 * tile):
            skip = (rows[..., j] < seen + math.log(0.01)).all(-1)
            seen = torch.where(skip[:, None], seen, seen.maximum(rows[..., j]))
            skipped, tiles = skipped + int(skip.sum()), tiles + 4
    assert skipped / tiles == pytest.approx(share, abs=0.03)


@pytest.mark.parametrize("source", ["real-like", "random", "captured"])
def test_command(tmp_path, source):
    from eval.speed import app

    options = ["--statistics", source]
    if source == "captured":
        generator = torch.Generator().manual_seed(0)
        q, k = (torch.randn(heads, 700, 64, generator=generator) for heads in (4, 2))
        save_file({"q": q, "k": k}, tmp_path / "one.safetensors")
        options = ["--captured", str(tmp_path / "one.safetensors")]
    arguments = [
        "--device",
        "cpu",
        "--shape",
        "4,2,64",
        "--contexts",
        "640",
        "--ks",
        "3",
        "--chunk",
        "256",
        "--repeats",
        "1",
    ]
    done = CliRunner().invoke(app, ["sparse-prefill", *arguments, *options, "--output", str(tmp_path)])
    assert done.exit_code == 0, done.output
    with (tmp_path / "sparse-prefill.csv").open() as file:
        rows = {row["system"]: row for row in csv.DictReader(file)}
    for name in ("ours, dense", "blasst, lambda 0", "exact, offloading, chunks of 256"):
        assert float(rows[name]["relative error"]) < 1e-5
    # 640 tokens are 5 query tiles with 0, 2, 4, 6 and 8 off-diagonal tiles, of which 3 stay.
    assert float(rows["bsfa, k 3"]["skipped"]) == pytest.approx((1 + 3 + 5) / 20)
    assert "blasst, lambda 0.01" in rows and float(rows["SDPA"]["TFLOP/s"]) > 0


def test_a_file_without_keys_is_refused(tmp_path):
    save_file({"q": torch.zeros(4, 8, 64)}, tmp_path / "one.safetensors")
    with pytest.raises(Exception, match=r"expected q \[heads, n, head_dim\] and k"):
        captured(tmp_path / "one.safetensors", "cpu", torch.float32)


def test_whole_model(tmp_path):
    """Every system answers; thresholds of a short text reach to the longest prompt; all layers are extrapolated."""
    from eval.speed import app

    arguments = [
        "--device",
        "cpu",
        "--shape",
        "tiny",
        "--layers",
        "1",
        "--contexts",
        "300,9000",
        "--chunks",
        "2048",
        "--k",
        "3",
    ]
    systems = ["--systems", "full,alaya,blasst,bsfa,retrieval", "--repeats", "1"]
    done = CliRunner().invoke(app, ["prefill", *arguments, *systems, "--output", str(tmp_path)])
    assert done.exit_code == 0, done.output
    with (tmp_path / "prefill.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 10 and not any(row["not run"] for row in rows)
    for row in rows:
        assert float(row["s, all layers"]) == pytest.approx(2 * float(row["s"]))
    # 71 query tiles with 0, 2, 4, ... off-diagonal tiles in one pass; chunks of 16 tiles see those of other blocks.
    assert float(rows[-2]["skipped"]) > 0.8
