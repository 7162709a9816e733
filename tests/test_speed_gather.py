"""Timing of decode steps through allocators: what is timed reads the right tokens."""

from __future__ import annotations

import pytest
import torch

from tests.interpreted import INTERPRETED, run_cases

pytest.importorskip("triton")
pytest.importorskip("eval.speed_gather", reason="needs a checkout")
if torch.cuda.is_available():
    pytest.skip("a GPU runs the command itself", allow_module_level=True)
from alaya_hf.registry import ALLOCATORS  # noqa: E402
from alaya_hf.storage.allocators import KVShape  # noqa: E402
from eval.speed_gather import measure  # noqa: E402


@pytest.mark.skipif(INTERPRETED, reason="is inside")
def test_in_interpreter():
    """The tests of this file that need the interpreter."""
    run_cases(__file__)


@pytest.mark.skipif(not INTERPRETED, reason="runs inside test_in_interpreter")
def test_case_every_allocator_gives_what_the_store_gives():
    """`measure` compares bit for bit and raises."""
    shape = KVShape(1, 2, 64, torch.float16)
    rows = measure(ALLOCATORS.names(), shape, 2, 512, 20, torch.device("cpu"), lambda steps: float(len(steps)))
    found = {(row["store"], row["memory"]): row for row in rows}
    assert len(found) == len(ALLOCATORS.names()) + 2
    assert found["paged", "host"]["blocks"] == 512 // 16 and found["virtual", "device"]["blocks"] == 1
    assert all(row["x contiguous"] == 1 for row in rows)
