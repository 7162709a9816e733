"""A cache with ``engine="device"`` on a CUDA device."""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.gpu
pytest.importorskip("triton")

from alaya_hf import DIPR, AlayaCache, TopK  # noqa: E402
from tests.gpu import layer_cases as cases  # noqa: E402


@pytest.fixture(scope="module")
def model():
    return cases.tiny_model("cuda")


@pytest.fixture
def tight(monkeypatch):
    """Store and low-bit copy grow by as little as they can: often, and while decoding."""
    from alaya_hf.engine.device import tokens

    monkeypatch.setattr(tokens, "_STORE_STEP", 8)
    monkeypatch.setattr(tokens, "_TILE_STEP", 0)


def test_generation_equals_dense(model, tight):
    cases.check_generation(model, 146, 8, cases.ALL.replace(query=TopK(128)))


def test_wide_range_and_chunks_equal_dense(model, tight):
    cases.check_wide_query(model)


def test_grows_out_of_min_context(model):
    cases.check_min_context(model)


def test_unequal_rows(model):
    cases.check_padding(model)


def test_crop(model):
    cases.check_crop(model, decoded=90)


def test_beams(model):
    cases.check_beams(model)


def test_copies(model):
    cases.check_copies(model)


def test_rows():
    cases.check_rows("cuda")


def test_probe(model):
    cases.check_probe(model)


@pytest.mark.parametrize("store_dtype", ["int8", "fp8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_eight_bit(store_dtype, dtype, tight):
    cases.check_eight_bit("cuda", store_dtype, dtype)


def test_hot_set(tight):
    cases.check_hot_set("cuda", 30)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("residual", ["low_bit", {"kind": "block_means", "block": 32}], ids=str)
def test_default_settings_agree_with_the_host(residual, dtype, tight):
    cases.check_default_settings("cuda", residual, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "begin", "new", "query", "dim"),
    [
        (4, 2, 100, 3, TopK(64), 32), (3, 1, 90, 5, TopK(3), 32), (8, 2, 230, 19, TopK(9), 128), (32, 8, 400, 32, TopK(32), 128),
        (7, 1, 600, 64, TopK(16), 64), (4, 4, 300, 90, TopK(8), 80), (16, 1, 1000, 200, DIPR(cap=32), 128),
        (12, 2, 150, 33, TopK(512), 64),
    ],
)  # fmt: skip
def test_short_pass(heads, kv_heads, begin, new, query, dim, dtype, tight):
    """Groups that fill warps and those that do not, more rows than a block has, more tokens than the window."""
    cases.check_short_pass("cuda", heads, kv_heads, begin, new, cases.DEFAULT.replace(query=query), dtype, 2, dim)


def test_short_passes_of_unequal_rows(model, tight):
    cases.check_short_passes(model)


def test_passes_keep_to_the_limit(monkeypatch):
    cases.check_passes_keep_to_the_limit("cuda", monkeypatch)


def test_passes_are_replayed(model):
    cases.check_captured_passes(model)


def test_sparse_prefill():
    cases.check_sparse_prefill("cuda")


def test_a_hundred_steps(model):
    cases.check_many_steps(model, 100)


@pytest.mark.parametrize("changes", [{}, {"hot_bytes": 2**20, "store_dtype": "int8"}], ids=str)
@pytest.mark.parametrize("new", [1, 9])
def test_a_pass_does_not_wait_for_the_host(model, changes, new):
    """Two passes after the first, which allocates and compiles; attention alone, because the model may wait."""
    cache = AlayaCache(cases.DEFAULT.replace(**changes))
    cases.logits(model, cache, cases.prompt(model, 150))
    layer = cache.layers[0]
    q, k = torch.randn(1, 4, new, 16, device="cuda").half(), torch.randn(1, 2, new, 16, device="cuda").half()
    for step in range(3):
        torch.cuda.set_sync_debug_mode("error" if step else "default")
        try:
            layer.update(k, k)
            layer.attend(q, 0.25)
        finally:
            torch.cuda.set_sync_debug_mode("default")
