"""The GPU kernels in Triton's interpreter, on a CPU, against their references.

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

from alaya_hf.kernels.gpu import checks as cases  # noqa: E402
from alaya_hf.kernels.gpu.layout import Layout  # noqa: E402

HALF, BF16 = torch.float16, torch.bfloat16
# head_dim, key bits, value bits, kv heads, group, tokens per row, dtype
SHAPES = [
    (64, 4, 2, 2, 3, [192, 70], HALF),
    (64, 4, 0, 1, 1, [0, 1], BF16),
    (80, 8, 4, 1, 2, [65], HALF),
    (128, 4, 2, 1, 8, [0, 130], BF16),
]


@pytest.mark.skipif(INTERPRETED, reason="is inside")
def test_in_interpreter():
    """Every test of this file that needs the interpreter."""
    run_cases(__file__)


@pytest.fixture(params=SHAPES, ids=lambda shape: "-".join(map(str, shape[:5])))
def case(request):
    return cases.Case(*request.param, device="cpu")


@inside
def test_case_quantise(case):
    cases.check_quantise(case)


@inside
def test_case_extend(case):
    cases.check_extend(case)
    cases.check_extend(cases.Case(64, 4, 2, 1, 1, [64, 0], HALF, "cpu", recent=110))


@inside
def test_case_window(case):
    cases.check_window(case)


@inside
def test_case_pass(case):
    cases.check_pass(case)


@inside
@pytest.mark.parametrize("beta, ratio", [(cases.INF, 1.0), (3.0, 1.0), (cases.INF, 0.5)])
def test_case_cut(case, beta, ratio):
    cases.check_cut(case, beta, ratio)


@inside
@pytest.mark.parametrize("replace", [True, False])
@pytest.mark.parametrize("union", [True, False])
def test_case_gather(case, union, replace):
    cases.check_gather(case, union, replace)


@inside
@pytest.mark.parametrize("block", [0, 16, 48])
def test_case_gather_through_a_block_table(case, block):
    cases.check_gather_blocks(case, block)


@inside
def test_case_prefix(case):
    cases.check_prefix(case)


@inside
def test_case_merge(case):
    cases.check_merge(case)


@inside
def test_case_step(case):
    cases.check_step(case, beta=20.0)


@inside
def test_case_many_rows():
    """More rows than one program serves, with a range; the last program's are not all there."""
    cases.check_pass_of_many_rows(cases.Case(64, 4, 2, 1, 7, [192, 70], HALF, "cpu"), 10, 20.0)


@inside
@pytest.mark.parametrize("store", [None, torch.int8], ids=str)
def test_case_append(store):
    """Rows that give no tile, one and two, one of them tokens that are new."""
    cases.check_append(cases.Case(32, 4, 2, 1, 1, [64, 0], HALF, "cpu", recent=101, store=store), 92)
    cases.check_append(cases.Case(32, 4, 0, 1, 1, [64], HALF, "cpu"), 3)


@inside
@pytest.mark.parametrize("shape, union", [(SHAPES[0], True), (SHAPES[1], False), (SHAPES[2], False)], ids=str)
def test_case_short_pass(shape, union):
    case = cases.Case(*shape, device="cpu")
    cases.check_window_rows(case)
    cases.check_short_pass(case, beta=20.0, union=union)


@inside
@pytest.mark.parametrize("check", cases.CHECKS.values(), ids=cases.CHECKS)
def test_case_every_operator_once(check):
    """What `alaya-hf doctor` runs."""
    for each in cases.two_cases("cpu"):
        check(each)


@inside
@pytest.mark.parametrize("store", [torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[2], SHAPES[3]], ids=lambda shape: str(shape[0]))
def test_case_eight_bit_store(shape, store):
    case = cases.Case(*shape, device="cpu", store=store)
    cases.check_window(case)
    cases.check_gather(case, True, True)
    cases.check_gather(case, False, False)
    cases.check_step(case)


@inside
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_case_eight_bit_codes(dtype):
    cases.check_codes("cpu", dtype)


@inside
@pytest.mark.parametrize("store", [None, torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("sets, union", [(1, True), (3, False)])
def test_case_hot_set(store, sets, union):
    cases.check_hot_set(cases.Case(64, 4, 2, 2, 3, [192, 70], HALF, "cpu", store=store), sets, 8, union)


@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("key_bits, value_bits", [(2, 2), (4, 2), (4, 4), (8, 8), (4, 0)])
def test_layout_holds_every_token(head_dim, key_bits, value_bits):
    """Error at most half a step (and float16's rounding) everywhere: no two codes share a place."""
    layout = Layout(head_dim, key_bits, value_bits)
    k, v = torch.rand(2, 1, 2, 150, head_dim)
    keys, values = (x[:, :, :150] for x in layout.unpack(layout.pack(k, v)))
    assert (keys - k).abs().max() <= 0.5 / ((1 << key_bits) - 1) + 2e-3
    if value_bits:
        assert (values - v).abs().max() <= 0.5 / ((1 << value_bits) - 1) + 2e-3
    else:
        torch.testing.assert_close(
            values[:, :, 64:96], v[:, :, 64:96].mean(2, keepdim=True).expand(-1, -1, 32, -1), atol=1e-3, rtol=1e-3
        )
    assert layout.record % 16 == 0


def test_unsupported_shapes_say_what_to_do():
    with pytest.raises(ValueError, match="multiple of 16"):
        Layout(72)
    with pytest.raises(ValueError, match="key_bits"):
        Layout(64, 3)
