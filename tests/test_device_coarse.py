"""The index ``coarse`` with ``engine="device"`` in Triton's interpreter; the same checks run on a GPU in tests/gpu.

Triton decides when it is imported, which other tests may have done: outside an interpreter this file runs itself again in one.
"""

from __future__ import annotations

import pytest
import torch

from alaya_hf import DIPR, AlayaCache, Full, TopK
from alaya_hf.engine.device.plan import DEFAULT_BLOCKS, device_plan
from alaya_hf.errors import ConfigError
from tests.gpu import coarse_cases as cases
from tests.gpu import layer_cases
from tests.interpreted import INTERPRETED, run_cases

inside = pytest.mark.skipif(not INTERPRETED, reason="runs inside test_in_interpreter")
every = pytest.mark.parametrize("settings", cases.SETTINGS.values(), ids=cases.SETTINGS)


@pytest.fixture(scope="module")
def model():
    return layer_cases.tiny_model("cpu")


@pytest.fixture
def tight(monkeypatch):
    """Store and index grow by as little as they can: often, and while decoding."""
    from alaya_hf.engine.device import tokens

    monkeypatch.setattr(tokens, "_STORE_STEP", 8)
    monkeypatch.setattr(tokens, "_TILE_STEP", 0)


@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="is inside, or a GPU runs the kernels themselves")
def test_in_interpreter():
    """Every test of this file that needs the interpreter."""
    pytest.importorskip("triton")
    run_cases(__file__)


@inside
@every
def test_case_generation_equals_dense(model, settings, tight):
    cases.check_generation(model, settings, 150, 4, prefill_chunk_size=67)


@inside
@every
def test_case_blocks_grow_and_shrink(settings, tight):
    cases.check_crops("cpu", settings)


@inside
def test_case_selection_of_the_host():
    cases.check_selection_of_the_host("cpu")


@inside
def test_case_grows_out_of_min_context(model):
    layer_cases.check_min_context(model, cases.COARSE)


@inside
def test_case_unequal_rows(model):
    layer_cases.check_padding(model, cases.COARSE)


@inside
def test_case_crop(model):
    layer_cases.check_crop(model, 1, cases.COARSE)


@inside
def test_case_beams(model):
    layer_cases.check_beams(model, cases.MEANS)


@inside
def test_case_copies(model):
    layer_cases.check_copies(model, cases.COARSE)


@inside
def test_case_rows():
    layer_cases.check_rows("cpu", cases.MEANS.replace(index={"kind": "coarse", "block": 32, "strategy": "mean"}))


@inside
def test_case_share_of_device_memory():
    cases.check_share("cpu")


UNSUPPORTED = {
    "full": {"query": Full()},
    "topk": {"query": TopK(513 * 128)},
    "cap": {"query": DIPR(cap=513 * 128)},
    "residual": {"residual": "low_bit"},
    "means": {"residual": {"kind": "block_means", "block": 128}},
    "block": {"index": {"kind": "coarse", "block": 100}},
    "count": {"index": {"kind": "coarse", "block": 128, "count": 65}},
    "hot set": {"hot_bytes": 1 << 20},
    "dense": {"dense_layers": (0,)},
}


@pytest.mark.parametrize("changes", UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_unsupported_settings_raise_before_there_is_a_model(changes):
    with pytest.raises(ConfigError, match="engine='host'"):
        AlayaCache(cases.COARSE.replace(**changes))


@pytest.mark.parametrize(
    ("query", "expected"),
    [(TopK(0), 0), (TopK(1), 1), (TopK(2048), 16), (TopK(2049), 17), (DIPR(), DEFAULT_BLOCKS), (DIPR(cap=129), 2)],
    ids=str,
)
def test_limits_in_tokens_are_blocks(query, expected):
    assert device_plan(cases.COARSE.replace(query=query), 0).cap == expected
