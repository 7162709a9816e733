"""A model over two GPUs: layers' caches lie with their layers, and answers are those of one GPU."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import warnings
import weakref

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]
pytest.importorskip("triton")

from accelerate import dispatch_model  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from alaya_hf import AlayaCache  # noqa: E402
from alaya_hf.cache_argument import cache_argument  # noqa: E402
from alaya_hf.sharding import device_map, memory_plan  # noqa: E402
from tests.gpu import layer_cases as cases  # noqa: E402
from tests.test_parallel import _free_port  # noqa: E402

TWO = {"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": 1, "model.norm": 1, "model.rotary_emb": 0,
       "lm_head": 1}  # fmt: skip


@pytest.mark.parametrize("settings", [cases.ALL, cases.DEFAULT, cases.DEFAULT.replace(store_dtype="int8")], ids=str)
def test_equal_to_one_gpu(settings):
    one = cases.tiny_model("cuda:0")
    ids = cases.prompt(one, 300, rows=2)
    wanted = cases.generate(one, AlayaCache(settings), ids, 12)
    model = dispatch_model(cases.tiny_model("cpu"), TWO)
    cache = AlayaCache(settings)
    assert cases.generate(model, cache, ids, 12) == wanted
    assert cases.generate(model, AlayaCache(settings), ids, 12, prefill_chunk_size=70) == wanted
    for idx, layer in enumerate(cache.layers):
        device = torch.device("cuda", idx)
        tokens = layer.tokens
        assert layer.device == tokens.window_k.device == tokens.records.device == device
        # Kernels of this device read the store in place, whichever device was current when it was registered.
        assert tokens.on_device.device == device and tokens.on_device.data_ptr() == tokens.store.data_ptr()
        assert torch.equal(tokens.on_device[0, :, 3].cpu(), tokens.store[0, :, 3])
    assert cache.stats()["replays"] > 0
    # Rows move, and buffers that are no longer used come back to the pool of all devices.
    cache.crop(-20)
    cache.batch_select_indices(torch.tensor([1, 0]))
    assert cache.get_seq_length() == 300 + 11 - 20


@pytest.fixture
def two():
    """Both blocks on one GPU each; a step that could not be captured only warns."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*could not be captured.*")
        yield dispatch_model(cases.tiny_model("cpu"), TWO)


def test_replayed_steps_are_the_steps(two, monkeypatch):
    """A graph per device: rows of unequal length, buffers that grow in the middle of the answer, the window that overflows."""
    from alaya_hf.engine.device import tokens

    monkeypatch.setattr(tokens, "_STORE_STEP", 64)
    monkeypatch.setattr(tokens, "_TILE_STEP", 0)
    ids = cases.prompt(two, 150, rows=3)
    mask = torch.ones_like(ids)
    mask[0, :70], mask[2, :3] = 0, 0
    cases.check_graphs(two, cases.DEFAULT, ids)
    cases.check_graphs(two, cases.DEFAULT, ids, attention_mask=mask)


def test_replayed_passes_of_several_tokens(two):
    cases.check_captured_passes(two)


def test_outputs_of_replays_are_not_overwritten(two):
    ids, cache, kept = cases.prompt(two, 150), AlayaCache(cases.DEFAULT), []
    with torch.no_grad():
        two(ids, **cache_argument(cache))
        for token in range(1, 8):
            out = two(input_ids=torch.tensor([[token]], device="cuda:0"), **cache_argument(cache))
            kept.append((out.logits, out.logits.clone()))
    assert cache.stats()["replays"] >= 4
    assert all(torch.equal(logits, copy) for logits, copy in kept)
    gone = weakref.ref(cache)
    gc.disable()
    try:
        del cache, out
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.slow
def test_two_processes_answer_as_one(tmp_path):
    """Tensor parallelism over NCCL: each rank keeps its KV heads on its own GPU."""
    cases.tiny_model("cpu", torch.float32).save_pretrained(tmp_path)
    found = []
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(_free_port())]
    for ranks, how in ((1, ["-m"]), (2, [*launch, "-m"])):
        command = [sys.executable, *how, "tests.tensor_parallel", str(tmp_path), str(ranks)]
        done = subprocess.run(
            command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{"))))
    assert found[0]["tokens"] == found[1]["tokens"]
    assert (found[0]["heads"], found[1]["heads"]) == ([2, 2], [1, 1])


def test_memory_registered_while_the_other_device_is_current():
    from alaya_hf.kernels.gpu.host_memory import device_view
    from alaya_hf.storage.pinned import PinnedPool

    with torch.cuda.device(0):
        store = PinnedPool().allocate((3, 5), torch.bfloat16).fill_(2)
    for index in (0, 1):
        view = device_view(store, torch.device("cuda", index))
        assert view.device.index == index and view.data_ptr() == store.data_ptr()
        view.add_(1)
        torch.cuda.synchronize(index)
    assert store.tolist() == [[4.0] * 5] * 3


def test_a_planned_map_loads_and_runs(tmp_path):
    cases.tiny_model("cpu").save_pretrained(tmp_path)
    config = AutoModelForCausalLM.from_pretrained(tmp_path).config
    needed = memory_plan(config, context=400, config=cases.DEFAULT, max_memory={0: "10GiB"}, dtype=torch.float16)
    share = needed.devices[0]
    block = share.cache // 2
    room = {0: share.working + share.weights + block, 1: share.needed}
    placed = device_map(config, context=400, config=cases.DEFAULT, max_memory=room, dtype=torch.float16)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=placed, dtype=torch.float16)
    ids = cases.prompt(model, 300)
    one = cases.tiny_model("cuda:0")
    wanted = cases.generate(one, AlayaCache(cases.DEFAULT), ids.to("cuda:0"), 8)
    assert cases.generate(model, AlayaCache(cases.DEFAULT), ids, 8) == wanted
