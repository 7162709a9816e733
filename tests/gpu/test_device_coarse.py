"""The index ``coarse`` with ``engine="device"`` on a CUDA device, and its kernels."""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.gpu
pytest.importorskip("triton")

from alaya_hf import DIPR, AlayaCache, TopK  # noqa: E402
from alaya_hf.kernels.gpu import block_checks  # noqa: E402
from alaya_hf.kernels.gpu.checks import Case  # noqa: E402
from tests.gpu import coarse_cases as cases  # noqa: E402
from tests.gpu import layer_cases  # noqa: E402

every = pytest.mark.parametrize("settings", cases.SETTINGS.values(), ids=cases.SETTINGS)
# head_dim, KV heads, group, tokens in blocks per row, dtype
SHAPES = [
    (64, 2, 3, [192, 70], torch.float16),
    (80, 3, 1, [0, 130, 1], torch.bfloat16),
    (128, 2, 8, [320, 0, 128], torch.bfloat16),
    (128, 1, 16, [300], torch.float16),
    (256, 2, 2, [77, 320], torch.bfloat16),
]


@pytest.fixture(scope="module")
def model():
    return layer_cases.tiny_model("cuda")


@pytest.fixture
def tight(monkeypatch):
    """Store and index grow by as little as they can: often, and while decoding."""
    from alaya_hf.engine.device import tokens

    monkeypatch.setattr(tokens, "_STORE_STEP", 8)
    monkeypatch.setattr(tokens, "_TILE_STEP", 0)


def _case(shape, layout, store=None):
    d, kv_heads, group, lows, dtype = shape
    case = Case(d, 4, 0, kv_heads, group, lows, dtype, "cuda", recent=103, store=store)
    return block_checks.BlockCase(case, *layout)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(map(str, shape[:3])))
@pytest.mark.parametrize("layout", block_checks.LAYOUTS, ids=lambda layout: "-".join(map(str, layout)))
@pytest.mark.parametrize("check", block_checks.CHECKS.values(), ids=block_checks.CHECKS)
def test_every_operator(check, layout, shape):
    if check is block_checks.check_extend_blocks:  # tiles are whole there
        shape = (*shape[:3], [low // 64 * 64 for low in shape[3]], shape[4])
    check(_case(shape, layout))


@pytest.mark.parametrize("layout", block_checks.LAYOUTS, ids=lambda layout: "-".join(map(str, layout)))
@pytest.mark.parametrize("store", [None, torch.int8, torch.float8_e4m3fn], ids=str)
def test_ranges_lists_and_stores(layout, store):
    for shape in SHAPES:
        block_checks.check_gather_blocks(_case(shape, layout, store), union=False)
        block_checks.check_coarse_step(_case(shape, layout, store), beta=20.0)
        block_checks.check_coarse_step(_case(shape, layout, store), union=False)


@every
def test_generation_equals_dense(model, settings, tight):
    cases.check_generation(model, settings, 150, 100, prefill_chunk_size=67)


@every
def test_blocks_grow_and_shrink(settings, tight):
    cases.check_crops("cuda", settings)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_selection_of_the_host(dtype):
    cases.check_selection_of_the_host("cuda", dtype)


def test_other_operations(model):
    layer_cases.check_min_context(model, cases.COARSE)
    layer_cases.check_padding(model, cases.COARSE)
    layer_cases.check_crop(model, 90, cases.COARSE)
    layer_cases.check_beams(model, cases.MEANS)
    layer_cases.check_copies(model, cases.COARSE)
    layer_cases.check_rows("cuda", cases.MEANS)


def test_share_of_device_memory():
    cases.check_share("cuda")


@every
def test_replayed_steps_equal_single_kernels(model, settings):
    layer_cases.check_graphs(model, settings.replace(query=TopK(160)), layer_cases.prompt(model, 200))


def test_replayed_steps_over_layers_with_different_indexes(model):
    """Layers that count alike and layers that do not, in one graph."""
    low_bit = {"index": "quantized", "residual": "low_bit", "query": DIPR(cap=64)}
    settings = cases.COARSE.replace(layers={1: {**low_bit, "index": {"kind": "quantized", "bits": 4, "margin": 0}}})
    layer_cases.check_graphs(model, settings, layer_cases.prompt(model, 200))


@every
def test_a_step_does_not_wait_for_the_host(model, settings):
    """Two steps after the first, which allocates and compiles; attention alone, because the model may wait."""
    cache = AlayaCache(settings)
    layer_cases.logits(model, cache, layer_cases.prompt(model, 150))
    layer = cache.layers[0]
    q, k = torch.randn(1, 4, 1, 16, device="cuda").half(), torch.randn(1, 2, 1, 16, device="cuda").half()
    for step in range(3):
        torch.cuda.set_sync_debug_mode("error" if step else "default")
        try:
            layer.update(k, k)
            layer.attend(q, 0.25)
        finally:
            torch.cuda.set_sync_debug_mode("default")
