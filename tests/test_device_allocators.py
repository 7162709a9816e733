"""The device engine's store in pools of allocators, in Triton's interpreter; the same checks run on a GPU in tests/gpu."""

from __future__ import annotations

import pytest
import torch

from alaya_hf import AlayaCache, AlayaConfig
from alaya_hf.errors import ConfigError, PoolFullError
from tests.gpu import allocator_cases as cases, layer_cases
from tests.interpreted import INTERPRETED, run_cases

inside = pytest.mark.skipif(not INTERPRETED, reason="runs inside test_in_interpreter")
each = pytest.mark.parametrize("name", cases.ALLOCATORS)


@pytest.fixture(scope="module")
def model():
    return layer_cases.tiny_model("cpu")


@pytest.fixture
def tight(monkeypatch):
    """Pools are small and full early; sequences grow often."""
    from alaya_hf.engine.device import tokens
    from alaya_hf.engine.device.store import group

    monkeypatch.setattr(tokens, "_STORE_STEP", 8)
    monkeypatch.setattr(group, "STEP", 8)


@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="is inside, or a GPU runs the kernels themselves")
def test_in_interpreter():
    """Every test of this file that needs the interpreter."""
    pytest.importorskip("triton")
    run_cases(__file__)


@inside
@each
def test_case_generation_equals_the_default(model, name, tight):
    cases.check_generation(model, name, 4)


@inside
@pytest.mark.parametrize("name", ["paged", "dynamic"])
def test_case_beams(model, name):
    cases.check_beams(model, name)


@inside
@each
@pytest.mark.parametrize("seed", [0, 1])
def test_case_random_operations(name, seed, tight):
    cases.check_layer("cpu", name, seed)


@inside
def test_case_eight_bit(tight):
    cases.check_layer("cpu", "segment", 2, 3, "int8")
