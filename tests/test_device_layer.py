"""A cache with ``engine="device"`` in Triton's interpreter, on a CPU; the same checks run on a GPU in tests/gpu.

Triton decides when it is imported, which other tests may have done: outside an interpreter this file runs itself again in one.
"""

from __future__ import annotations

import gc

import pytest
import torch

from alaya_hf import DIPR, AlayaCache, AlayaConfig, AlayaLayer, Full, Recovery, TopK
from alaya_hf.device_layer import DeviceLayer
from alaya_hf.errors import ConfigError, HostMemoryError, UnsupportedModelError
from alaya_hf.probes import Probe
from alaya_hf.storage import memory, pinned
from alaya_hf.storage.pinned import PinnedPool
from tests.gpu import layer_cases as cases
from tests.interpreted import INTERPRETED, long, run_cases

inside = pytest.mark.skipif(not INTERPRETED, reason="runs inside test_in_interpreter")


@pytest.fixture(scope="module")
def model():
    return cases.tiny_model("cpu")


@pytest.fixture
def tight(monkeypatch):
    """Store and low-bit copy grow by as little as they can: often, and while decoding."""
    from alaya_hf.engine.device import tokens

    monkeypatch.setattr(tokens, "_STORE_STEP", 8)
    monkeypatch.setattr(tokens, "_TILE_STEP", 0)


@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="is inside, or a GPU runs the kernels themselves")
def test_in_interpreter():
    """Every test of this file that needs the interpreter."""
    pytest.importorskip("triton")
    run_cases(__file__)


@inside
def test_case_generation_equals_dense(model, tight):
    cases.check_generation(model, 150, 4, cases.ALL.replace(query=TopK(128)))


@inside
def test_case_wide_range_and_chunks_equal_dense(model, tight):
    cases.check_wide_query(model)


@inside
def test_case_a_prompt_in_chunks_makes_its_store_once(model, tight, monkeypatch):
    """``generate`` knows the length before the first chunk; decoding makes it grow again."""
    from alaya_hf.engine.device.store import TensorStore

    own, made = TensorStore._make, []
    monkeypatch.setattr(TensorStore, "_make", lambda self, *args: made.append(args[1]) or own(self, *args))
    cases.generate(model, AlayaCache(cases.ALL), cases.prompt(model, 100), 1, prefill_chunk_size=30)
    assert made == [0, 96] * 2


@inside
def test_case_grows_out_of_min_context(model):
    cases.check_min_context(model)


@inside
def test_case_unequal_rows(model):
    cases.check_padding(model)


@inside
def test_case_crop(model):
    cases.check_crop(model, decoded=1)


@inside
def test_case_beams(model):
    cases.check_beams(model)


@inside
def test_case_copies(model):
    cases.check_copies(model)


@inside
def test_case_rows():
    cases.check_rows("cpu")


@inside
def test_case_probe(model):
    cases.check_probe(model)


@inside
@pytest.mark.parametrize("residual", ["low_bit", {"kind": "block_means", "block": 32}], ids=str)
def test_case_default_settings_agree_with_the_host(residual, tight):
    cases.check_default_settings("cpu", residual, torch.bfloat16)


@inside
def test_case_out_of_host_memory_the_layer_goes_on_without_the_pass(monkeypatch):
    """The store has 1,024 places in a pool of just as many bytes, and the host has no more."""
    from alaya_hf.engine.device.store import tensor

    monkeypatch.setattr(pinned, "FIRST", 2 << 20)
    pool = PinnedPool()
    monkeypatch.setattr(tensor, "pinned_pool", lambda: pool)
    layer, twin = DeviceLayer(cases.DEFAULT), DeviceLayer(cases.DEFAULT)
    k, v = torch.randn(2, 1, 2, 1100, 256).half()
    q = torch.randn(1, 2, 1100, 256).half()
    first, much, then = slice(0, 90), slice(0, 1100), slice(90, 92)
    cases.attend(layer, q[:, :, first], k[:, :, first], v[:, :, first])
    assert pool.stats.largest == 0
    with monkeypatch.context() as patch:
        patch.setattr(memory, "available_host_memory", lambda: 0)
        with pytest.raises(HostMemoryError, match="Shorten the context"):
            cases.attend(layer, q[:, :, much], k[:, :, much], v[:, :, much])
        found = cases.attend(layer, q[:, :, then], k[:, :, then], v[:, :, then])
    cases.attend(twin, q[:, :, first], k[:, :, first], v[:, :, first])
    assert torch.equal(found, cases.attend(twin, q[:, :, then], k[:, :, then], v[:, :, then]))
    del layer, twin, found
    gc.collect()
    assert pool.trim() == pool.stats.peak and pool.stats.held == 0


@inside
def test_case_hot_set(tight):
    cases.check_hot_set("cpu", 2, rows=1, kv_heads=1)


@inside
@pytest.mark.parametrize("store_dtype", ["int8", "fp8"])
def test_case_eight_bit(store_dtype, tight):
    cases.check_eight_bit("cpu", store_dtype)


@inside
@pytest.mark.parametrize(
    ("heads", "kv_heads", "begin", "new", "query"),
    [(4, 2, 100, 3, TopK(64)), (3, 1, 90, 5, TopK(3)), (2, 1, 210, 19, TopK(9))],
    ids=["all", "some", "a tile leaves"],
)
def test_case_short_pass(heads, kv_heads, begin, new, query, tight):
    cases.check_short_pass("cpu", heads, kv_heads, begin, new, cases.DEFAULT.replace(query=query))


@long
@inside
def test_case_short_passes_of_unequal_rows(model, tight):
    cases.check_short_passes(model)


@inside
def test_case_passes_keep_to_the_limit(monkeypatch):
    cases.check_passes_keep_to_the_limit("cpu", monkeypatch)


@inside
def test_case_sparse_prefill():
    cases.check_sparse_prefill("cpu")


@inside
def test_case_footprint():
    """A row of evaluation counts the workspace, and the hot set beside what the cache has to hold."""
    from eval.running.row import footprint

    cache = AlayaCache(cases.ALL.replace(hot_bytes=2**16))
    for tokens in (100, 1):
        k = torch.randn(1, 2, tokens, 16).half()
        cache.update(k, k, 0)
        cache.layers[0].attend(k, 0.25)
    stats, row = cache.stats(), footprint(cache)
    assert (
        row["device_bytes"]
        == stats["device_bytes"]
        == sum(stats[name] for name in ("window_bytes", "lowbit_bytes", "workspace_bytes"))
    )
    assert (
        0 < row["workspace_bytes"] == stats["workspace_bytes"] and 0 < row["hot_bytes"] == stats["hot_bytes"] <= 2**16
    )
    assert row["full_bytes"] == 101 * 2 * 2 * 16 * 2


@inside
def test_case_other_precisions_and_features_are_refused():
    k, layer = torch.zeros(1, 2, 3, 16), DeviceLayer(cases.DEFAULT)
    with pytest.raises(UnsupportedModelError, match="bfloat16 or float16"):
        layer.update(k, k)
    layer = DeviceLayer(cases.DEFAULT.replace(store_dtype="float32"))
    with pytest.raises(ConfigError, match="store_dtype"):
        layer.update(k.half(), k.half())
    layer = DeviceLayer(cases.DEFAULT)
    layer.update(k.half(), k.half())
    for option in ({"softcap": 20.0}, {"sinks": torch.zeros(2)}):
        with pytest.raises(UnsupportedModelError, match="engine='host'"):
            layer.attend(k.half(), 0.25, **option)


UNSUPPORTED = {
    "full": {"query": Full()},
    "topk": {"query": TopK(513)},
    "cap": {"query": DIPR(cap=513)},
    "recovery": {"query": Recovery(cap=513)},
    "index": {"index": "flat", "residual": "none"},
    "margin": {"index": {"kind": "quantized", "margin": 2}},
    "bits": {"index": {"kind": "quantized", "bits": 8, "margin": 0}},
    "block": {"residual": {"kind": "block_means", "block": 16}},
    "dense": {"dense_layers": (3,)},
    "layer": {"layers": {2: {"query": "full"}}},
}


@pytest.mark.parametrize("changes", UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_unsupported_settings_raise_before_there_is_a_model(changes):
    settings = AlayaConfig(engine="device", **changes)
    with pytest.raises(ConfigError, match="engine='host'"):
        AlayaCache(settings)
    AlayaCache(settings.replace(engine="host"))


def test_eight_bit_stores_need_the_device_engine():
    for store_dtype in ("int8", "fp8"):
        with pytest.raises(ConfigError, match="engine='device'"):
            AlayaConfig(store_dtype=store_dtype)
        settings = AlayaConfig(store_dtype=store_dtype, engine="device")
        with pytest.raises(ConfigError, match="engine='device'"):
            settings.replace(layers={1: {"engine": "host"}})
        mixed = {1: {"engine": "host", "store_dtype": "auto"}}
        assert settings.replace(layers=mixed).for_layer(1).store_dtype == "auto"


def test_layers_choose_their_engine():
    settings = AlayaConfig(engine="device", layers={1: {"query": "full", "engine": "host"}})
    cache = AlayaCache(settings)
    kinds = [type(cache._new_layer(number)) for number in range(3)]
    assert kinds == [DeviceLayer, AlayaLayer, DeviceLayer]


def test_observers_are_refused():
    probe = Probe(observer=lambda *args: None)
    with pytest.raises(ConfigError, match="engine='host'"):
        DeviceLayer(AlayaConfig(engine="device"), probe=probe)


def test_fields_are_checked():
    with pytest.raises(ConfigError, match="engine"):
        AlayaConfig(engine="gpu")


@pytest.mark.skipif(INTERPRETED, reason="the interpreter serves CPUs")
def test_a_cpu_is_refused():
    layer = DeviceLayer(AlayaConfig(query=DIPR(), engine="device"))
    k = torch.zeros(1, 2, 3, 16, dtype=torch.bfloat16)
    with pytest.raises(ConfigError, match="CUDA"):
        layer.update(k, k)


@pytest.mark.parametrize(
    ("query", "expected"),
    [(DIPR(), 256), (DIPR(cap=7), 7), (DIPR(cap=512), 512), (Recovery(), 256), (Recovery(cap=9), 9), (TopK(300), 300)],
    ids=str,
)
def test_the_query_brings_the_limit_on_exact_tokens(query, expected):
    from alaya_hf.engine.device.plan import device_plan

    assert device_plan(AlayaConfig(query=query, engine="device"), 0).cap == expected
