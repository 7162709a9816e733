"""What the device engine's calibration runs, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from alaya_hf.kernels.gpu.store_format import StoreFormat
from alaya_hf.planner import ModelShape
from alaya_hf.planner.measure_host import sample_layer
from tests.interpreted import INTERPRETED, run_cases


@pytest.mark.skipif(INTERPRETED, reason="runs the others")
def test_in_interpreter() -> None:
    run_cases(__file__)


@pytest.mark.skipif(not INTERPRETED, reason="runs inside test_in_interpreter")
@pytest.mark.parametrize("dtype", [torch.float16, torch.int8])
@pytest.mark.parametrize("bits", [(4, 2), (4, 0)])
def test_case_of_a_calibration(dtype: torch.dtype, bits: tuple[int, int]) -> None:
    """Stages run on what a step left, one after the other, and a step's tokens are fetched."""
    from alaya_hf.planner import measure_device

    shape = ModelShape(1, 4, 2, 32, torch.float16)
    row, q = sample_layer(shape, 1000)
    keys, values = (row[None, :, :, side].contiguous() for side in (0, 1))
    form = StoreFormat(32, dtype)
    store = torch.zeros(1, 2, 1000 - 128 + 64, *form.tail, dtype=form.dtype)
    store[0, :, : 1000 - 128].copy_(form.pack(keys[0, :, 128:], values[0, :, 128:]))
    case = measure_device._Case(shape, 1000, bits, 16, store, form, keys, values, q.reshape(1, -1, 32).half())
    out = case.step().clone()
    assert bool(out.isfinite().all()) and int(case.work.fetched.sum()) > 0
    for stage in case.stages().values():
        stage()
    assert torch.allclose(case.work.out.float(), out.float(), atol=1e-2)
