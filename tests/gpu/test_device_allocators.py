"""The device engine's store in pools of allocators, on a CUDA device."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.gpu
pytest.importorskip("triton")

from tests.gpu import allocator_cases as cases  # noqa: E402
from tests.gpu import layer_cases  # noqa: E402

each = pytest.mark.parametrize("name", cases.ALLOCATORS)


@pytest.fixture(scope="module")
def model():
    return layer_cases.tiny_model("cuda")


@pytest.fixture
def tight(monkeypatch):
    """Sequences grow often, pools are full early."""
    from alaya_hf.engine.device import tokens
    from alaya_hf.engine.device.store import group

    monkeypatch.setattr(tokens, "_STORE_STEP", 8)
    monkeypatch.setattr(group, "STEP", 8)


@pytest.mark.parametrize("store_dtype", ["auto", "int8", "fp8"])
def test_passes_equal_the_default(store_dtype, tight):
    cases.check_passes("cuda", store_dtype, rows=2, heads=4)


@each
def test_generation_equals_the_default(model, name, tight):
    """Decode steps are captured; pools move in between, which drops the graph."""
    cases.check_generation(model, name, 40, cases.SMALL.replace(cuda_graphs="none"))
    cases.check_generation(model, name, 40)


@each
def test_growing_in_the_pool_keeps_a_captured_step(model, name, monkeypatch):
    from alaya_hf.engine.device.store import group

    monkeypatch.setattr(group, "STEP", 8)
    cache = cases.check_generation(model, name, 40, cases.SMALL.replace(pool_bytes=None))
    assert cache.graphs.captures <= 2 and cache.stats()["replays"] >= 30


@each
def test_beams(model, name):
    cases.check_beams(model, name)


@each
@pytest.mark.parametrize("seed", range(4))
def test_random_operations(name, seed, tight):
    cases.check_layer("cuda", name, seed, 20)


def test_random_operations_in_eight_bits(tight):
    cases.check_layer("cuda", "segment", 2, 10, "int8")
