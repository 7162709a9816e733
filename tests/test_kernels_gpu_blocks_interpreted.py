"""The GPU kernels over blocks in Triton's interpreter, on a CPU, against their references.

Triton decides when it is imported, which other tests may have done: outside an interpreter this file runs itself again in one.
"""

from __future__ import annotations

import pytest
import torch

from tests.interpreted import INTERPRETED, run_cases

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("a GPU runs the kernels themselves: tests/gpu", allow_module_level=True)
inside = pytest.mark.skipif(not INTERPRETED, reason="runs inside test_in_interpreter")

from alaya_hf.kernels.gpu import block_checks as cases  # noqa: E402
from alaya_hf.kernels.gpu.block_layout import BlockLayout  # noqa: E402
from alaya_hf.kernels.gpu.checks import Case  # noqa: E402

HALF, BF16 = torch.float16, torch.bfloat16
# head_dim, KV heads, group, tokens in blocks per row, dtype
SHAPES = [(64, 2, 3, [192, 64], HALF), (80, 1, 1, [0, 130], BF16), (32, 1, 9, [320], BF16)]


@pytest.mark.skipif(INTERPRETED, reason="is inside")
def test_in_interpreter():
    """Every test of this file that needs the interpreter."""
    run_cases(__file__)


def made(shape, layout, store=None, recent=110):
    d, kv_heads, group, lows, dtype = shape
    return cases.BlockCase(Case(d, 4, 0, kv_heads, group, lows, dtype, "cpu", recent=recent, store=store), *layout)


@inside
@pytest.mark.parametrize("layout", cases.LAYOUTS, ids=lambda layout: "-".join(map(str, layout)))
@pytest.mark.parametrize("check", cases.CHECKS.values(), ids=cases.CHECKS)
def test_case_every_operator(check, layout):
    for shape in SHAPES:
        # A window that gives 64 tokens away is full of `local` + 63 before the step; tiles are whole there.
        whole = (*shape[:3], [low // 64 * 64 for low in shape[3]], shape[4])
        check(made(whole if check is cases.check_extend_blocks else shape, layout, recent=103))


@inside
@pytest.mark.parametrize("layout", cases.LAYOUTS[1:3], ids=lambda layout: "-".join(map(str, layout)))
def test_case_ranges_and_lists_of_one_head(layout):
    case = made(SHAPES[0], layout)
    cases.check_gather_blocks(case, union=False)
    cases.check_coarse_step(case, beta=6.0)
    cases.check_coarse_step(made(SHAPES[0], layout), beta=20.0, union=False)


@inside
@pytest.mark.parametrize("store", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_case_eight_bit_store(store):
    for layout in cases.LAYOUTS[:3]:
        cases.check_gather_blocks(made(SHAPES[1], layout, store))
        cases.check_coarse_step(made(SHAPES[0], layout, store))


def test_layout_of_four_percent():
    """The default: InfLLM's blocks of 128 take 0.4 % of bfloat16 keys and values."""
    layout = BlockLayout(128)
    assert layout.bytes_per_token == 2 and 2 / (2 * 128 * 2) < 0.004
    assert layout.allocate(1, 2, 129, "cpu").shape == (1, 2, 2, 1, 128)


@pytest.mark.parametrize(
    ("changes", "match"),
    [({"head_dim": 72}, "multiple of 16"), ({"tokens": 100}, "blocks of 16"), ({"strategy": "x"}, "strategy"),
     ({"count": 65}, "1 to 64")],
)  # fmt: skip
def test_unsupported_sizes_say_what_is_expected(changes, match):
    with pytest.raises(ValueError, match=match):
        BlockLayout(**{"head_dim": 64, **changes})
