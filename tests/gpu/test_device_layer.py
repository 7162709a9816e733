"""A cache with ``engine="device"`` on a CUDA device."""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.gpu
pytest.importorskip("triton")

from alaya_hf import AlayaCache, TopK  # noqa: E402
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


def test_sparse_prefill():
    cases.check_sparse_prefill("cuda")


def test_a_hundred_steps(model):
    cases.check_many_steps(model, 100)


@pytest.mark.parametrize("changes", [{}, {"hot_bytes": 2**20, "store_dtype": "int8"}], ids=str)
def test_a_step_does_not_wait_for_the_host(model, changes):
    """Two steps after the first, which allocates and compiles; attention alone, because the model may wait."""
    cache = AlayaCache(cases.DEFAULT.replace(**changes))
    cases.logits(model, cache, cases.prompt(model, 150))
    layer = cache.layers[0]
    q, k = torch.randn(1, 4, 1, 16, device="cuda").half(), torch.randn(1, 2, 1, 16, device="cuda").half()
    for step in range(3):
        torch.cuda.set_sync_debug_mode("error" if step else "default")
        try:
            layer.update(k, k)
            layer.attend(q, 0.25)
        finally:
            torch.cuda.set_sync_debug_mode("default")
