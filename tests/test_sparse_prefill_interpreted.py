"""Tile-skipping attention in Triton's interpreter, on a CPU, against its reference and dense attention."""

from __future__ import annotations

import pytest
import torch

from tests.interpreted import INTERPRETED, run_cases

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("a GPU runs the kernel itself: tests/gpu", allow_module_level=True)
inside = pytest.mark.skipif(not INTERPRETED, reason="runs inside test_in_interpreter")

from alaya_hf.kernels.sparse_prefill import checks  # noqa: E402

HALF, BF16 = torch.float16, torch.bfloat16
# head_dim, kv heads, group, m, n, causal, dtype, batch
SHAPES = [
    (64, 1, 3, 300, 300, True, HALF, 2),
    (80, 2, 2, 130, 401, True, BF16, 1),
    (96, 1, 2, 128, 192, False, HALF, 1),
    (128, 1, 4, 200, 333, False, BF16, 1),
    (128, 2, 1, 1, 257, True, HALF, 1),
    (16, 1, 1, 150, 90, True, HALF, 1),
]


@pytest.mark.skipif(INTERPRETED, reason="is inside")
def test_in_interpreter():
    """Every test of this file that needs the interpreter."""
    run_cases(__file__)


@pytest.fixture(params=SHAPES, ids=lambda shape: "-".join(map(str, shape[:6])))
def case(request):
    return checks.Case(*request.param)


@inside
@pytest.mark.parametrize("relative", [False, True], ids=["bsfa", "blasst"])
def test_case_skipping(case, relative):
    checks.check_skipping(case, relative)


@inside
@pytest.mark.parametrize("relative", [False, True], ids=["bsfa", "blasst"])
def test_case_nothing_skipped(case, relative):
    checks.check_nothing_skipped(case, relative)


@inside
@pytest.mark.parametrize("relative", [False, True], ids=["bsfa", "blasst"])
@pytest.mark.parametrize("shape", [(64, 1, 3, 140, 500, True, HALF, 2), (80, 2, 1, 60, 333, True, BF16, 1)], ids=str)
def test_case_blocks(shape, relative):
    checks.check_blocks(checks.Case(*shape), relative)


@inside
def test_case_poisoned_outputs(case):
    checks.check_poison(case)


@inside
def test_case_maxima(case):
    checks.check_maxima(case)


@inside
def test_case_operator():
    checks.check_operator(checks.Case(*SHAPES[0]))


@inside
def test_case_cuts():
    checks.check_cuts(checks.Case(64, 1, 2, 200, 333, True, HALF))


@inside
def test_case_layouts():
    checks.check_layouts(checks.Case(64, 2, 2, 150, 200, True, HALF))
