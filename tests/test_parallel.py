"""Models over several processes (tensor parallelism) and with weights that Accelerate keeps elsewhere."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

import pytest
import torch
from accelerate import cpu_offload, disk_offload

from alaya_hf import AlayaCache, AlayaConfig
from alaya_hf.decode_graph import _one_device
from tests.gpu import layer_cases as cases

SETTINGS = AlayaConfig(window=(4, 20), min_context=0)


def _free_port() -> int:
    with socket.socket() as own:
        own.bind(("127.0.0.1", 0))
        return own.getsockname()[1]


@pytest.mark.slow
def test_two_ranks_answer_as_one(tmp_path):
    """Each rank keeps its KV heads and nothing of the others'; what the configuration says is all of them."""
    cases.tiny_model("cpu", torch.float32).save_pretrained(tmp_path)
    found = []
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(_free_port())]
    for ranks, how in ((1, ["-m"]), (2, [*launch, "-m"])):
        command = [sys.executable, *how, "tests.tensor_parallel", str(tmp_path), str(ranks)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{"))))
    assert found[0]["tokens"] == found[1]["tokens"]
    assert (found[0]["heads"], found[1]["heads"]) == ([2, 2], [1, 1])


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offloaded_weights_change_nothing(where, tmp_path):
    """Weights that come for a pass and go again: the cache stays where the passes run, and no graph is captured."""
    model = cases.tiny_model("cpu", torch.float32)
    ids = cases.prompt(model, 150)
    wanted = cases.generate(model, AlayaCache(SETTINGS), ids, 8)
    assert _one_device(model)
    if where == "cpu":
        cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
    assert all(weight.is_meta for weight in model.parameters()) and not _one_device(model)
    cache = AlayaCache(SETTINGS)
    assert cases.generate(model, cache, ids, 8) == wanted
    assert {str(layer.device) for layer in cache.layers} == {"cpu"}


def test_a_model_dispatched_by_a_device_map_answers_the_same(tmp_path):
    """Blocks computing in place beside blocks that are read from disk for every pass."""
    from accelerate import dispatch_model

    model = cases.tiny_model("cpu", torch.float32)
    ids = cases.prompt(model, 150)
    wanted = cases.generate(model, AlayaCache(SETTINGS), ids, 8)
    placed = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu",
              "model.rotary_emb": "cpu", "lm_head": "cpu"}  # fmt: skip
    model = dispatch_model(model, placed, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True)
    assert cases.generate(model, AlayaCache(SETTINGS), ids, 8) == wanted and not _one_device(model)
