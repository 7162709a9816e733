"""The decode kernels on a CUDA device, against their references."""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.gpu
pytest.importorskip("triton")

from alaya_hf.kernels.gpu import checks as cases  # noqa: E402
from alaya_hf.kernels.gpu import lowbit, nvrtc  # noqa: E402

HALF, BF16 = torch.float16, torch.bfloat16
# head_dim, key bits, value bits, kv heads, group, tokens per row, dtype, cap
SHAPES = [
    (64, 4, 2, 2, 3, [192, 70], HALF, 5),
    (64, 4, 0, 1, 1, [0, 1], BF16, 32),
    (80, 8, 4, 3, 2, [65, 320, 1], HALF, 8),
    (80, 2, 2, 1, 7, [300], BF16, 20),
    (96, 4, 2, 2, 5, [127, 64], BF16, 17),
    (128, 4, 2, 2, 8, [0, 130, 320], BF16, 32),
    (128, 4, 4, 1, 4, [319], HALF, 1),
    (128, 4, 0, 2, 8, [256, 3], HALF, 32),
    (128, 8, 2, 1, 16, [200], BF16, 300),
    (256, 4, 2, 1, 12, [190], BF16, 9),
    (256, 4, 0, 2, 2, [77, 320], HALF, 9),
]


@pytest.fixture(params=SHAPES, ids=lambda shape: "-".join(map(str, shape[:5])))
def case(request):
    return cases.Case(*request.param[:7], device="cuda", cap=request.param[7])


def test_quantise(case):
    cases.check_quantise(case)


def test_extend(case):
    cases.check_extend(case)


def test_window(case):
    cases.check_window(case)


@pytest.mark.parametrize("beta", [cases.INF, 3.0])
@pytest.mark.parametrize("implementation", ["cuda", "triton"])
def test_pass(case, beta, implementation, monkeypatch):
    if implementation == "triton":
        monkeypatch.setattr(nvrtc, "available", lambda device: False)
    elif not nvrtc.available(0):
        pytest.skip("needs NVRTC and compute capability 8.0")
    cases.check_pass(case, beta)


@pytest.mark.parametrize("beta", [cases.INF, 3.0])
@pytest.mark.parametrize("positions", [2, 5, 32])
@pytest.mark.parametrize("implementation", ["cuda", "triton"])
def test_pass_of_many_rows(case, positions, beta, implementation, monkeypatch):
    """Warps and blocks that are full, and those that are not."""
    if implementation == "triton":
        monkeypatch.setattr(nvrtc, "available", lambda device: False)
    elif not nvrtc.available(0):
        pytest.skip("needs NVRTC and compute capability 8.0")
    cases.check_pass_of_many_rows(case, positions, beta)


def test_append(case):
    for new in (2, 70, 92):
        cases.check_append(case, new)


@pytest.mark.parametrize(
    "new, positions, beta, union", [(5, 2, 20.0, True), (33, 33, cases.INF, False), (32, 16, 50.0, True)]
)
def test_short_pass(case, new, positions, beta, union):
    cases.check_window_rows(case, new, new - positions, positions)
    cases.check_short_pass(case, new, positions, beta, union)


@pytest.mark.parametrize("beta, ratio", [(cases.INF, 1.0), (3.0, 1.0), (cases.INF, 0.5)])
def test_cut(case, beta, ratio):
    cases.check_cut(case, beta, ratio)


@pytest.mark.parametrize("replace", [True, False])
@pytest.mark.parametrize("union", [True, False])
def test_gather(case, union, replace):
    cases.check_gather(case, union, replace)


@pytest.mark.parametrize("block", [0, 16, 48])
def test_gather_through_a_block_table(case, block):
    cases.check_gather_blocks(case, block)


def test_prefix(case):
    cases.check_prefix(case)


def test_merge(case):
    cases.check_merge(case)


@pytest.mark.parametrize("beta, ratio, union", [(20.0, 1.0, True), (cases.INF, 1.0, False), (cases.INF, 0.5, True)])
def test_step(case, beta, ratio, union):
    cases.check_step(case, beta, ratio, union)


@pytest.mark.parametrize("store", [torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(map(str, shape[:5])))
def test_eight_bit_store(shape, store):
    case = cases.Case(*shape[:7], device="cuda", cap=shape[7], store=store)
    cases.check_window(case)
    cases.check_gather(case, True, True)
    cases.check_gather(case, False, False)
    cases.check_step(case)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_eight_bit_codes(dtype):
    cases.check_codes("cuda", dtype)


@pytest.mark.parametrize("store", [None, torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("sets, union", [(1, True), (3, False), (7, True)])
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[2], SHAPES[5], SHAPES[10]], ids=lambda shape: str(shape[0]))
def test_hot_set(shape, sets, union, store):
    cases.check_hot_set(cases.Case(*shape[:7], device="cuda", cap=shape[7], store=store), sets, 30, union)


def test_operators_know_their_fakes(case):
    """`torch.compile` may trace a step: schemas say what is written."""
    work = case.work()
    arguments = (case.records, case.q, case.low, work.best, work.tile_max, work.scores, work.acc, work.ml, 0, work.parts,
                 case.scaling, 1.0, *case.bits)  # fmt: skip
    torch.library.opcheck(lowbit.lowbit_pass, arguments, test_utils=("test_schema", "test_faketensor"))


def _generation(graphed, store_dtype=None, sets=0):
    """Outputs of 150 steps, the tokens in the low-bit copy after them, and what was looked up and found in the hot set."""
    from alaya_hf.kernels.gpu.host_memory import device_view
    from alaya_hf.kernels.gpu.hot_set import HotSet
    from alaya_hf.kernels.gpu.step import decode_step
    from alaya_hf.kernels.gpu.window import advance

    torch.manual_seed(0)
    case = cases.Case(64, 4, 2, 2, 4, [64, 128], BF16, "cuda", store=store_dtype)
    work, (keys, values), form = case.work(), case.window(), case.form
    store = torch.zeros(2, 2, 600, form.row_bytes, dtype=torch.uint8, pin_memory=True)
    store = store.view(form.dtype).view(2, 2, 600, *form.tail)
    exact = form.unpack(case.store()).nan_to_num(0.0)
    store[:, :, : max(case.counts) + 1] = form.pack(exact[..., 0, :], exact[..., 1, :])
    view, hot = device_view(store), HotSet(2, 2, sets, form, case.device) if sets else None
    steps = torch.randn(150, 2, 8, 64, device="cuda").to(BF16)
    q, k, v = (torch.zeros(2, heads, 64, dtype=BF16, device="cuda") for heads in (8, 2, 2))

    def step():
        place = (case.records, case.total, case.low, case.init, case.local)
        decode_step(work, q, k, v, keys, values, view, *place, case.scaling, 15.0, hot=hot)
        advance(case.total, case.low, case.init, case.local, cases.TILES * 64)

    state = [keys, values, case.records, case.total, case.low]
    if hot is not None:
        state += [hot.rows.view(torch.uint8), hot.tags, hot.stamps, hot.claims, hot.counts]
    before = [x.clone() for x in state]
    step()  # compiles
    for x, was in zip(state, before, strict=True):
        x.copy_(was)
    graph = torch.cuda.CUDAGraph()
    if graphed:
        with torch.cuda.graph(graph):
            step()
    found = []
    for x in steps:
        q.copy_(x), k.copy_(x[:, 2:4]), v.copy_(x[:, 4:6])
        graph.replay() if graphed else step()
        found.append(work.out.clone())
    return torch.stack(found), case.low.tolist(), [0, 0] if hot is None else hot.counts.tolist()


def test_graph_replays_a_generation():
    """Steps replayed from a graph equal steps run one by one, while the window overflows into the low-bit copy."""
    (eager, low, _), (graphed, low_graphed, _) = _generation(False), _generation(True)
    assert low == low_graphed == [192, 256]
    assert torch.equal(eager, graphed)


@pytest.mark.parametrize("store", [None, torch.int8, torch.float8_e4m3fn], ids=str)
def test_graph_replays_a_generation_with_a_hot_set(store):
    """Neither the graph nor the hot set changes a bit of the answers."""
    (plain, *_), (eager, _, counts), (graphed, _, counts_graphed) = (
        _generation(*how) for how in ((False, store), (False, store, 4), (True, store, 4))
    )
    assert torch.equal(plain, eager) and torch.equal(eager, graphed)
    assert counts == counts_graphed and 0 < counts[1] < counts[0]
