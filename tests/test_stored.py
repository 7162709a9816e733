"""Stored contexts under ``engine="device"`` in Triton's interpreter, on a CPU; the same checks run on a GPU in tests/gpu.

Triton decides when it is imported, which other tests may have done: outside an interpreter this file runs itself again in one.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from alaya_hf.storage.db.records import RecordFormat
from tests.gpu import layer_cases
from tests.interpreted import INTERPRETED, long, run_cases

inside = pytest.mark.skipif(not INTERPRETED, reason="runs inside test_in_interpreter")


@pytest.fixture(scope="module")
def cases():
    pytest.importorskip("triton")
    from tests.gpu import stored_cases

    return stored_cases


@pytest.fixture(scope="module")
def model():
    return layer_cases.tiny_model("cpu")


@pytest.fixture(autouse=True)
def tight(monkeypatch):
    """Store and low-bit copy grow by as little as they can: often, and while decoding."""
    if INTERPRETED:
        from alaya_hf.engine.device import tokens

        monkeypatch.setattr(tokens, "_STORE_STEP", 8)
        monkeypatch.setattr(tokens, "_TILE_STEP", 0)


@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="is inside, or a GPU runs the kernels themselves")
def test_in_interpreter():
    """Every test of this file that needs the interpreter."""
    pytest.importorskip("triton")
    run_cases(__file__)


@given(st.integers(0, 200), st.lists(st.integers(1, 400), min_size=1, max_size=6))
def test_every_tile_lies_in_one_file(init, lengths):
    """However a context is cut into segments, their tiles together are those of the whole, in order."""
    form = RecordFormat(init, 4, 2, 8)
    stops = [sum(lengths[: number + 1]) for number in range(len(lengths))]
    found = [tile for start, stop in zip([0, *stops], stops, strict=False) for tile in form.tiles(start, stop)]
    assert found == list(range(max(0, stops[-1] - init) // 64))
    assert all(form.last_token(tile) < stops[-1] for tile in found)


@inside
def test_case_round_trip(cases, model, tmp_path):
    cases.check_round_trip(model, tmp_path)


@inside
def test_case_shared(cases, model, tmp_path):
    cases.check_shared(model, tmp_path)


@long
@inside
def test_case_branches(cases, model, tmp_path):
    cases.check_branches(model, tmp_path, prefer=1)


OPERATION = st.one_of(
    st.tuples(st.just("decode"), st.integers(1, 3)),
    st.tuples(st.just("append"), st.sampled_from([2, 3, 66, 90])),
    st.tuples(st.just("crop"), st.integers(1, 260)),
    st.tuples(st.just("repeat"), st.just(2)),
    st.tuples(st.just("select"), st.integers(0, 2)),
    st.tuples(st.sampled_from(["copy", "settings", "store"]), st.just(0)),
)


@inside
@settings(
    max_examples=1, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(steps=st.lists(OPERATION, min_size=1, max_size=4))
@example([("decode", 1), ("crop", 40), ("append", 70), ("store", 0), ("repeat", 2), ("decode", 1), ("select", 1)])
@example([("crop", 200), ("append", 80), ("copy", 0), ("crop", 10), ("settings", 0), ("decode", 1), ("store", 0)])
def test_case_operations(cases, model, steps):
    with tempfile.TemporaryDirectory() as folder:
        cases.check_operations(model, Path(folder), steps)


@inside
def test_case_other_makers(cases, model, tmp_path):
    cases.check_other_makers(model, tmp_path)


@inside
@pytest.mark.parametrize("where", ["kv", "records"])
def test_case_damage(cases, model, tmp_path, where):
    cases.check_damage(model, tmp_path, where)
