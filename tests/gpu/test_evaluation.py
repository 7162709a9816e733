"""Evaluation by two processes, each with a GPU of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]
pytest.importorskip("datasets", reason="the evaluation needs the extra 'eval'")
pytest.importorskip("jinja2")

from tests.test_parallel import _free_port  # noqa: E402


def test_each_process_has_its_gpu_and_half_of_the_work(tmp_path):
    port = _free_port()

    def start(rank):
        about = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = {**os.environ, **{name: str(value) for name, value in about.items()}}
        command = [sys.executable, "-m", "tests.legal_process", str(tmp_path), "cuda"]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    outs = [process.communicate(timeout=500)[0] for process in [start(0), start(1)]]
    assert "device cuda:0" in outs[0] and "device cuda:1" in outs[1], outs
    assert "8 rows of all processes" in outs[0], outs
    found = [len((tmp_path / f"rows.{rank}.jsonl").read_text().splitlines()) for rank in (0, 1)]
    assert found == [4, 4]
    rows = [json.loads(line) for rank in (0, 1) for line in (tmp_path / f"rows.{rank}.jsonl").open()]
    assert len({(row["item"], row["system"]) for row in rows}) == 8
