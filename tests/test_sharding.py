"""Device maps that count the cache, against caches that are really filled."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from alaya_hf import AlayaCache, AlayaConfig
from alaya_hf.cache_argument import cache_argument
from alaya_hf.errors import ConfigError, UnsupportedModelError
from alaya_hf.footprint import layer_footprints, working_bytes
from alaya_hf.sharding import DeviceMemoryError, device_map, memory_plan
from tests.gpu import layer_cases as cases
from tests.interpreted import INTERPRETED, run_cases

GIB = 1 << 30
inside = pytest.mark.skipif(not INTERPRETED, reason="runs inside test_in_interpreter")
DEVICE = AlayaConfig(engine="device")
COARSE = {"index": {"kind": "coarse", "block": 16, "strategy": "bounds"}, "residual": "none", "query": "topk"}


def config(**changes) -> LlamaConfig:
    sizes = {
        "vocab_size": 1024, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 4,
        "num_key_value_heads": 2, "tie_word_embeddings": False, "max_position_embeddings": 1 << 20,
    }  # fmt: skip
    return LlamaConfig(**{**sizes, **changes}, dtype=torch.bfloat16)


@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="is inside, or a GPU runs the kernels themselves")
def test_in_interpreter():
    pytest.importorskip("triton")
    run_cases(__file__)


@inside
@pytest.mark.parametrize(
    "changes", [{}, {"min_context": 500}, {"store_dtype": "int8"}, {"hot_bytes": 1 << 20}, COARSE], ids=str
)
def test_case_a_filled_cache_takes_what_was_planned(changes):
    """All at once, as after a prefill in one pass, then one step for workspace and hot set."""
    model = cases.tiny_model("cpu")
    settings, tokens, batch = cases.DEFAULT.replace(**changes), 300, 2
    planned = layer_footprints(model.config, settings, batch, tokens, torch.float16)
    cache = AlayaCache(settings, config=model.config)
    ids = cases.prompt(model, tokens, rows=batch)
    with torch.no_grad():
        model(ids[:, :-1], **cache_argument(cache))
        model(ids[:, -1:], **cache_argument(cache))
    for layer, footprint in zip(cache.alaya_layers, planned, strict=True):
        assert layer.window_bytes + layer.lowbit_bytes + layer.index_bytes + layer.hot_bytes == footprint.device
        assert layer.tokens.store.numel() * layer.tokens.store.element_size() <= footprint.host
        step = [size for key, size in footprint.workspace.items() if key[-1] == 1]
        assert step == [cache.stats()["workspace_bytes"]]


def test_the_host_engine_takes_what_was_planned():
    """Window exactly; vectors and indexes, which are scaled from fewer tokens, nearly."""
    shape = config(num_hidden_layers=2)
    settings, tokens = AlayaConfig(window=(4, 60), min_context=0), 2500
    planned = layer_footprints(shape, settings, 1, tokens, torch.float32)
    cache = AlayaCache(settings, config=shape)
    kv = torch.randn(1, 2, tokens, 64)
    for layer, footprint in zip(cache.alaya_layers, planned, strict=True):
        layer.fill(kv, kv)
        layer.update(kv[:, :, :1], kv[:, :, :1])
        layer.attend(kv[:, :, :1].repeat_interleave(2, 1), 0.1)
        assert layer.window_bytes <= footprint.device
        host = layer.offloaded_bytes + layer.index_bytes + layer.lowbit_bytes
        assert host == pytest.approx(footprint.host, rel=0.02)


def test_working_memory_is_that_of_the_tensors_made():
    """A chunk of a model whose MLP dwarfs the rest: three of its activations live at a time; weights do not count."""
    tokens, wide = 512, 1 << 14
    shape = config(intermediate_size=wide, hidden_size=64, head_dim=16)
    found = working_bytes(shape, DEVICE, 1, tokens, tokens, torch.bfloat16)
    one = 2 * tokens * wide
    assert 3 * one <= found <= 3.5 * one


def _devices(plan, name="model.layers."):
    """The device of every block."""
    from alaya_hf.sharding import _Planner

    return [_Planner._of(plan.device_map, f"{name}{idx}") for idx in range(6)]


def test_the_map_leaves_room_for_the_cache():
    """With hardly any weights, the cache decides: a device holds as many blocks as it has room for caches."""
    shape, context = config(), 1 << 18
    per_layer = layer_footprints(shape, DEVICE, 1, context, torch.bfloat16)[0].device
    assert per_layer > 25 << 20
    first = memory_plan(shape, context=context, config=DEVICE, max_memory={0: 10 * GIB})
    share = first.devices[0]
    assert set(_devices(first)) == {0} and share.needed == share.weights + share.cache + share.working < 10 * GIB
    each = share.working + share.cache - 6 * per_layer  # a device's buffers, whatever the number of layers
    tight = {0: each + 4 * per_layer, 1: each + 5 * per_layer}
    plan = memory_plan(shape, context=context, config=DEVICE, max_memory=tight)
    blocks = _devices(plan)
    assert blocks == sorted(blocks) and set(blocks) == {0, 1}
    assert [plan.devices[d].blocks for d in (0, 1)] == [blocks.count(0), blocks.count(1)]
    assert all(share.needed <= share.available for share in plan.devices.values())
    total = sum(p.numel() for p in AutoModelForCausalLM.from_config(shape).parameters()) * 2
    assert abs(sum(share.weights for share in plan.devices.values()) - total) < 4096  # and small buffers
    assert plan.device_map == device_map(shape, context=context, config=DEVICE, max_memory=tight)
    # Where there is room, the devices hold alike.
    even = _devices(memory_plan(shape, context=context, config=DEVICE, max_memory={0: 10 * GIB, 1: 10 * GIB}))
    assert even.count(0) in (2, 3, 4)


def test_what_does_not_fit_is_refused():
    shape, context = config(), 1 << 18
    with pytest.raises(DeviceMemoryError, match=r"needs .* GiB on 1 device\(s\).*available.*more devices"):
        device_map(shape, context=context, config=DEVICE, max_memory={0: "200MiB"})
    with pytest.raises(ConfigError, match="context must be"):
        device_map(shape, context=0)
    with pytest.raises(ConfigError, match="no device to compute on"):
        device_map(shape, context=10, max_memory={"disk": 10})
    with pytest.raises(UnsupportedModelError, match="do not divide among 3 ranks"):
        memory_plan(shape, context=4096, config=DEVICE, ranks=3, max_memory={0: GIB})


def test_offloaded_weights_keep_their_cache_on_the_first_device():
    """Their blocks run there, so that is where their keys come to be."""
    shape, context = config(intermediate_size=1 << 15, num_hidden_layers=6), 4096
    whole = memory_plan(shape, context=context, config=DEVICE, max_memory={0: 10 * GIB})
    block = whole.devices[0].weights // 6
    room = {0: whole.devices[0].needed - 2 * block, "cpu": GIB}
    plan = memory_plan(shape, context=context, config=DEVICE, max_memory=room)
    assert plan.host_weights > 0 and "cpu" in _devices(plan)
    assert plan.devices[0].blocks == 6 and plan.devices[0].cache == whole.devices[0].cache
    with pytest.raises(DeviceMemoryError):
        memory_plan(shape, context=context, config=DEVICE, max_memory={0: room[0]})


def test_host_memory_and_ranks():
    plan = memory_plan(config(), context=1 << 17, config=DEVICE, ranks=2, max_memory={0: 10 * GIB})
    exact = 6 * 2 * 2 * 64 * 2 * (1 << 17)
    assert exact <= plan.host_cache <= 1.05 * exact
    assert plan.host_cache_per_rank == pytest.approx(plan.host_cache / 2, rel=0.05)
    assert "per rank" in str(plan) and len(str(plan).splitlines()) == 3


def test_a_plan_needs_no_thresholds_of_one_layer(tmp_path):
    """Sparse prefill's thresholds are those of all layers, and what a pass works with is found with one."""
    from alaya_hf.engine.prefill.thresholds import Thresholds, model_shape

    model = config(num_hidden_layers=3)
    path = tmp_path / "k2.safetensors"
    Thresholds(torch.zeros(3, 4, 8), model_shape(model), {}).save(path)
    exact = AlayaConfig(min_context=0)
    given = {"context": 800, "chunk": 256, "max_memory": {0: "1GiB"}}
    sparse = memory_plan(model, config=exact.replace(prefill={"kind": "bsfa", "thresholds": str(path)}), **given)
    assert sparse.devices == memory_plan(model, config=exact, **given).devices
