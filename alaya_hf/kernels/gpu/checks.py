"""What the decode kernels must do, on any device: each check runs a kernel on poisoned buffers against its reference.

The tests run them over many shapes, `alaya-hf doctor` over two. They assert, so they say nothing under ``python -O``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from alaya_hf.kernels.gpu import cut, eight_bit, gather, hot_set, lowbit, merge, quantise, window
from alaya_hf.kernels.gpu.hot_set import HotSet
from alaya_hf.kernels.gpu.layout import TILE, Layout
from alaya_hf.kernels.gpu.step import Workspace, decode_step
from alaya_hf.kernels.gpu.store_format import StoreFormat

INF = float("inf")
TILES = 5  # capacity of the low-bit copies here


class Case:
    """A layer's state: `lows[row]` tokens in the store and the low-bit copy, the window behind them."""

    def __init__(
        self, d: int, key_bits: int, value_bits: int, kv_heads: int, group: int, lows: Sequence[int], dtype: torch.dtype,
        device: torch.device | str, cap: int = 5, init: int = 4, local: int = 40, recent: int = 47,
        store: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        self.form = StoreFormat(d, dtype if store is None else store)
        self.layout = Layout(d, key_bits, value_bits)
        self.bits = (key_bits, value_bits)
        self.d, self.h, self.g, self.b = d, kv_heads, group, len(lows)
        self.lows, self.init, self.local, self.cap = list(lows), init, local, cap
        self.dtype, self.device, self.scaling = dtype, torch.device(device), d**-0.5
        self.ring = local + 2 * TILE
        self.counts = [init + low + recent for low in lows]
        n = max(self.counts) + 1
        shape = (self.b, kv_heads, n, d)
        self.k, self.v = (
            (torch.randn(shape, device=device) * torch.rand(d, device=device) * 2).to(dtype) for _ in "kv"
        )
        self.q = (2 * torch.randn(self.b, kv_heads * group, d, device=device)).to(dtype)
        self.total = torch.tensor(self.counts, dtype=torch.int32, device=device)
        self.low = torch.tensor(lows, dtype=torch.int32, device=device)
        self.new_k = torch.stack([self.k[row, :, count] for row, count in enumerate(self.counts)])
        self.new_v = torch.stack([self.v[row, :, count] for row, count in enumerate(self.counts)])
        part = slice(init, init + max(lows))
        self.records = torch.full(
            (self.b, kv_heads, TILES, self.layout.record // 4), -1, dtype=torch.int32, device=device
        )
        for row, low in enumerate(lows):
            packed = self.layout.pack(
                self.k[row : row + 1, :, part][:, :, :low], self.v[row : row + 1, :, part][:, :, :low]
            )
            self.records[row, :, : packed.shape[2]] = packed[0]

    def store(self) -> Tensor:
        """The host's tokens, NaN where there is none."""
        shape = (self.b, self.h, max(self.counts) + 1, self.form.row_bytes)
        store = torch.full(shape, 255, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        store = store.view(self.form.dtype).view(*shape[:3], *self.form.tail)
        for row, count in enumerate(self.counts):
            places = slice(self.init, count)
            store[row, :, : count - self.init] = self.form.pack(
                self.k[row, :, places].cpu(), self.v[row, :, places].cpu()
            )
        return store

    def defined(self, rows: Tensor) -> Tensor:
        """The bytes of rows that mean something: padding may hold anything."""
        flat = rows.reshape(*rows.shape[: rows.dim() - len(self.form.tail)], self.form.row).view(torch.uint8)
        return flat[..., : 2 * self.d + 8] if self.form.scaled else flat

    def on_device(self, store: Tensor) -> Tensor:
        """The store as kernels take it."""
        if self.device.type != "cuda":
            return store
        from alaya_hf.kernels.gpu.host_memory import device_view

        return device_view(store, self.device)

    def window(self) -> tuple[Tensor, Tensor]:
        """Slots that hold no token of the window are NaN."""
        shape = (self.b, self.h, self.init + self.ring, self.d)
        keys, values = (torch.full(shape, float("nan"), dtype=self.dtype, device=self.device) for _ in "kv")
        for row, count in enumerate(self.counts):
            for p in [*range(self.init), *range(self.init + self.lows[row], count)]:
                slot = p if p < self.init else self.init + (p - self.init) % self.ring
                keys[row, :, slot], values[row, :, slot] = self.k[row, :, p], self.v[row, :, p]
        return keys, values

    def work(self) -> Workspace:
        """Poisoned buffers."""
        slots = self.init + self.ring
        work = Workspace(
            self.b, self.h, self.g, self.layout, TILES * TILE, slots, self.cap, self.device, torch.float32, self.form
        )
        for name, x in vars(work).items():
            if isinstance(x, Tensor) and name != "best":
                x = x.view(torch.int8) if x.element_size() == 1 else x
                x.fill_(float("nan") if x.is_floating_point() else -77)
        return work

    def merged(self, work: Workspace, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp of some of the partials."""
        out, lse = torch.empty_like(work.out), torch.empty_like(work.lse)
        part = slice(first, first + count)
        merge.merge_partials_reference(
            work.acc[..., part, :], work.ml[..., part, :], out, lse, torch.empty_like(work.best)
        )
        return out, lse


def plain(q: Tensor, k: Tensor, v: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    """The yardstick: attention in low precision."""
    s = (q.to(dtype) @ k.to(dtype).transpose(-1, -2)).float() * scaling
    return (torch.softmax(s, -1).to(dtype) @ v.to(dtype)).float()


def within_twice(found: Tensor, yardstick: Tensor, truth: Tensor, slack: float = 1e-5) -> None:
    """Error at most twice the yardstick's, against float32."""
    assert not found.isnan().any()
    assert (found.float() - truth).abs().max() <= 2 * (yardstick.float() - truth).abs().max() + slack


def check_quantise(case: Case) -> None:
    """As good as the reference's quantisation, and no worse than half a step for each token."""
    chunk = slice(case.init, case.init + max(case.lows))
    found, wanted = torch.full_like(case.records, -1), torch.full_like(case.records, -1)
    first = torch.zeros_like(case.low)
    arguments = (case.k[:, :, chunk], case.v[:, :, chunk])
    quantise.quantise_tokens(*arguments, found, first, case.low, *case.bits)
    quantise.quantise_tokens_reference(*arguments, wanted, first, case.low, *case.bits)
    for mine, theirs, exact in zip(
        case.layout.unpack(found), case.layout.unpack(wanted), (case.k, case.v), strict=True
    ):
        for row, low in enumerate(case.lows):
            x, y, z = mine[row, :, :low], theirs[row, :, :low], exact[row, :, chunk].float()[:, :low]
            assert not x.isnan().any()
            # A code may differ where a value lies half-way between two.
            assert low == 0 or ((x - y).abs() > 1e-3 * y.abs().clamp_min(1)).float().mean() < 0.01
            assert low == 0 or ((x - z).abs().max() <= 1.01 * (y - z).abs().max() + 1e-3)
    untouched = -(-max(case.lows) // TILE)
    assert (found[:, :, untouched:] == -1).all()


def check_extend(case: Case) -> None:
    """Rows whose window is full give their 64 oldest recent tokens, the others nothing."""
    work, (keys, values) = case.work(), case.window()
    arguments = (case.q, case.new_k, case.new_v, keys, values, None, case.total, case.low)
    window.window_attention(*arguments, work.best, work.acc, work.ml, 0, case.init, case.scaling)
    found, wanted = case.records.clone(), case.records.clone()
    for local in (40, 10_000):
        if case.ring < local + TILE:
            continue
        for run, records in ((quantise.extend_lowbit, found), (quantise.extend_lowbit_reference, wanted)):
            run(keys, values, records, case.total, case.low, case.init, local, *case.bits)
    for mine, theirs in zip(case.layout.unpack(found), case.layout.unpack(wanted), strict=True):
        close = (mine - theirs).abs() <= 1e-3 * theirs.abs().clamp_min(1)
        assert (close | (mine.isnan() & theirs.isnan()) | (mine == theirs)).float().mean() > 0.99
    total, low = case.total.clone(), case.low.clone()
    window.advance(total, low, case.init, case.local, TILES * TILE)
    moved = (found != case.records).flatten(1).any(1)
    assert torch.equal(moved, low != case.low) and torch.equal(total, case.total + 1)


def check_window(case: Case) -> None:
    """Attention to the window and the new token; the token is in window and store afterwards."""
    found, wanted = case.work(), case.work()
    states = []
    for run, work in ((window.window_attention, found), (window.window_attention_reference, wanted)):
        keys, values = case.window()
        store = case.on_device(case.store())
        run(case.q, case.new_k, case.new_v, keys, values, store, case.total, case.low, work.best, work.acc, work.ml, 0,
            case.init, case.scaling)  # fmt: skip
        states.append((keys, values, case.defined(store)))
    for mine, theirs in zip(*states, strict=True):
        assert torch.equal(mine.nan_to_num(9.0), theirs.nan_to_num(9.0))
    for row, count in enumerate(case.counts):
        wanted_row = case.defined(case.form.pack(case.new_k[row], case.new_v[row]))
        assert torch.equal(states[0][2][row, :, count - case.init], wanted_row)
    (out, lse), (truth, true_lse) = (case.merged(work, 0, work.window_parts) for work in (found, wanted))
    low = []
    for row, count in enumerate(case.counts):
        held = [*range(case.init), *range(case.init + case.lows[row], count + 1)]
        q = case.q[row].view(case.h, case.g, case.d)
        low.append(plain(q, case.k[row][:, held], case.v[row][:, held], case.scaling, case.dtype).flatten(0, 1))
    within_twice(out, torch.stack(low), truth)
    torch.testing.assert_close(lse, true_lse, atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(found.best, wanted.best, atol=2e-2, rtol=2e-3)


def run_pass(case: Case, beta: float = INF, run: Callable[..., None] = lowbit.lowbit_pass) -> Workspace:
    """The low-bit pass on poisoned buffers."""
    work = case.work()
    run(case.records, case.q, case.low, work.best, work.tile_max, work.scores, work.acc, work.ml, 0, work.parts,
        case.scaling, beta, *case.bits)  # fmt: skip
    return work


def check_pass(case: Case, beta: float = INF) -> None:
    """Scores, tile maxima, best scores and attention of every token of the low-bit copy."""
    found, wanted = run_pass(case, beta), run_pass(case, run=lowbit.lowbit_pass_reference)
    out, lse = case.merged(found, 0, found.parts)
    truth, true_lse = case.merged(wanted, 0, wanted.parts)
    keys, values = case.layout.unpack(case.records)
    yardstick, best = torch.zeros_like(truth), wanted.best
    for row, low in enumerate(case.lows):
        k, v = keys[row, :, :low], values[row, :, :low]
        q = case.q[row].view(case.h, case.g, case.d)
        if low == 0:
            assert torch.isneginf(lse[row]).all() and (out[row] == 0).all()
            continue
        yardstick[row] = plain(q, k, v, case.scaling, case.dtype).flatten(0, 1)
        exact = q.float() @ k.transpose(1, 2)
        rounded = (q.to(case.dtype) @ k.to(case.dtype).transpose(1, 2)).half()
        tiles = -(-low // TILE)
        written = wanted.tile_max[row, ..., :tiles].float() >= best[row][..., None] - beta + 0.5
        written = written.repeat_interleave(TILE, -1)[..., :low]
        scores = torch.where(written, found.scores[row, ..., :low].float(), exact)
        within_twice(scores, rounded, exact, slack=float(exact.abs().max()) * 2**-9)
        top = torch.nn.functional.pad(exact, (0, tiles * TILE - low), value=-INF).unflatten(-1, (tiles, TILE)).amax(-1)
        within_twice(
            found.tile_max[row, ..., :tiles],
            rounded.amax(-1, keepdim=True),
            top,
            slack=float(exact.abs().max()) * 2**-8,
        )
        torch.testing.assert_close(found.best[row], exact.amax(-1), atol=0.05, rtol=4e-3)
    within_twice(out, yardstick, truth, slack=1e-3)
    torch.testing.assert_close(lse, true_lse, atol=6e-3, rtol=1e-3)


def check_cut(case: Case, beta: float, ratio: float) -> None:
    """The selection, exactly."""
    work = run_pass(case, run=lowbit.lowbit_pass_reference)
    mine, theirs = case.work(), case.work()
    for run, to in ((cut.cut, mine), (cut.cut_reference, theirs)):
        run(work.tile_max, work.scores, work.best, work.ml, case.low, to.ids, to.counts, to.thresholds, to.limits, to.chosen, 0,
            work.parts, case.scaling, beta, ratio)  # fmt: skip
    if ratio == 1:
        assert torch.equal(mine.counts, theirs.counts)
        real = torch.arange(case.cap, device=case.device) < mine.counts[..., None]
        assert torch.equal(mine.ids.masked_fill(~real, 0), theirs.ids.masked_fill(~real, 0))
    else:  # tokens that tie with the last one needed may come along
        assert ((mine.counts >= theirs.counts) & (mine.counts <= theirs.counts + 2) & (mine.counts <= case.cap)).all()
    real = torch.arange(case.cap, device=case.device) < mine.counts[..., None]
    taken = work.scores.float().gather(-1, mine.ids.long().clamp_min(0))
    assert (taken >= mine.thresholds[..., None])[real].all()
    assert (mine.counts <= case.low.clamp_max(case.cap)[:, None, None]).all()


def check_gather(case: Case, union: bool, replace: bool) -> None:
    """Exact terms in, approximate terms out; each token is fetched once."""
    work = run_pass(case, run=lowbit.lowbit_pass_reference)
    cut.cut_reference(work.tile_max, work.scores, work.best, work.ml, case.low, work.ids, work.counts, work.thresholds,
                      work.limits, work.chosen, 0, work.parts, case.scaling, INF, 1.0)  # fmt: skip
    store = case.on_device(case.store())
    results = []
    for run in (gather.gather_attention, gather.gather_attention_reference):
        to = case.work()
        # The pass's partials come along, so that what is taken out is there to be taken out of.
        to.acc[..., : work.parts, :], to.ml[..., : work.parts, :] = (
            work.acc[..., : work.parts, :],
            work.ml[..., : work.parts, :],
        )
        first = work.parts
        run(store, case.q, work.ids, work.counts, work.thresholds, work.limits, work.scores, case.records, to.acc, to.ml,
            to.fetched, first, case.scaling, *case.bits, union, replace)  # fmt: skip
        begin = 0 if replace else first
        results.append((*case.merged(to, begin, first + to.gather_parts - begin), to.fetched.sum(-1)))
    (out, lse, fetched), (truth, true_lse, wanted) = results
    assert torch.equal(fetched, wanted)
    torch.testing.assert_close(out, truth, atol=3e-3, rtol=2e-3)
    torch.testing.assert_close(lse, true_lse, atol=2e-3, rtol=1e-3)


def check_gather_blocks(case: Case, block: int, gap: int = 3) -> None:
    """Tokens that an allocator scattered are those of the store: the same partials, bit for bit."""
    work = run_pass(case, run=lowbit.lowbit_pass_reference)
    cut.cut_reference(work.tile_max, work.scores, work.best, work.ml, case.low, work.ids, work.counts, work.thresholds,
                      work.limits, work.chosen, 0, work.parts, case.scaling, INF, 1.0)  # fmt: skip
    store = case.on_device(case.store())
    batch, heads, capacity = store.shape[:3]
    size, count = (block, -(-capacity // block)) if block else (capacity, 1)
    places = torch.randperm(batch * count * gap)[: batch * count].view(batch, count)
    rows = torch.full(
        (batch * count * gap * size, heads, 2, case.d), float("nan"), dtype=store.dtype, device=store.device
    )
    for row in range(batch):
        for i, place in enumerate(places[row].tolist()):
            part = store[row, :, i * size : (i + 1) * size].transpose(0, 1)
            rows[place * size : place * size + len(part)] = part
    # Offsets count from somewhere in the middle.
    middle = int(places[0, 0]) * size
    pool = rows.flatten()[middle * heads * 2 * case.d :]
    blocks = ((places * size - middle) * heads * 2 * case.d).to(store.device)
    arguments = (case.q, work.ids, work.counts, work.thresholds, work.limits, work.scores, case.records)
    results = []
    for run in (gather.gather_attention_blocks, gather.gather_attention_blocks_reference, None):
        to = case.work()
        to.acc.zero_()
        how = (work.parts, case.scaling, *case.bits, True, True)
        if run is None:
            gather.gather_attention(store, *arguments, to.acc, to.ml, to.fetched, *how)
        else:
            run(pool, blocks, *arguments, to.acc, to.ml, to.fetched, block, *how)
        results.append(to)
    found, reference, wanted = results
    parts = slice(work.parts, work.parts + wanted.gather_parts)
    assert torch.equal(found.fetched, wanted.fetched)
    assert torch.equal(found.ml[..., parts, :], wanted.ml[..., parts, :])
    assert torch.equal(found.acc[..., parts, :], wanted.acc[..., parts, :])
    assert torch.equal(reference.fetched.sum(-1), wanted.fetched.sum(-1))
    out, lse, truth, true_lse = (
        x for to in (found, reference) for x in case.merged(to, work.parts, wanted.gather_parts)
    )
    torch.testing.assert_close(out, truth, atol=3e-3, rtol=2e-3)
    torch.testing.assert_close(lse, true_lse, atol=2e-3, rtol=1e-3)


def check_merge(case: Case) -> None:
    """Any partials, some empty, some rows with none."""
    work = case.work()
    partials = work.ml.shape[3]
    empty = torch.rand(work.ml.shape[:-1], device=case.device) < 0.5
    empty[0, 0, 0] = True
    work.acc.copy_(torch.where(empty[..., None], float("nan"), torch.randn(work.acc.shape, device=case.device)))
    work.ml[..., 0] = torch.where(empty, -INF, 30 * torch.randn(case.b, case.h, case.g, partials, device=case.device))
    work.ml[..., 1] = torch.rand(case.b, case.h, case.g, partials, device=case.device) + 0.5
    out, lse = torch.empty_like(work.out), torch.empty_like(work.lse)
    merge.merge_partials_reference(work.acc, work.ml, out, lse, torch.empty_like(work.best))
    merge.merge_partials(work.acc, work.ml, work.out, work.lse, work.best)
    torch.testing.assert_close(work.out, out, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(work.lse, lse, atol=1e-5, rtol=1e-4)
    assert torch.isneginf(work.best).all()


def check_step(case: Case, beta: float = INF, ratio: float = 1.0, union: bool = True) -> None:
    """A whole step against one softmax over exact and approximate terms, given the selection it made."""
    work, (keys, values), store = case.work(), case.window(), case.store()
    view = case.on_device(store)
    out = decode_step(work, case.q, case.new_k, case.new_v, keys, values, view, case.records, case.total, case.low,
                      case.init, case.local, case.scaling, beta, ratio, union)  # fmt: skip
    rough_k, rough_v = case.layout.unpack(case.records)
    truth, yardstick = torch.empty_like(work.out), torch.empty_like(work.out)
    for row, count in enumerate(case.counts):
        low, here = case.lows[row], slice(case.init, case.init + case.lows[row])
        k, v = case.k[row, :, : count + 1].float(), case.v[row, :, : count + 1].float()
        ak, av = k.clone(), v.clone()
        ak[:, here], av[:, here] = rough_k[row, :, :low], rough_v[row, :, :low]
        exact = torch.ones(case.h, case.g, count + 1, dtype=torch.bool, device=case.device)
        exact[:, :, here] = False
        for h in range(case.h):
            for g in range(case.g):
                exact[h, g, case.init + work.ids[row, h, g, : work.counts[row, h, g]].long()] = True
        asked = exact.clone()
        exact = exact.any(1, keepdim=True).expand_as(exact).clone()
        if not union:
            exact = asked
        q = case.q[row].view(case.h, case.g, case.d)
        # What a plain implementation would read from the store.
        rows = case.form.unpack(case.form.pack(k[:, here], v[:, here]))
        stored_k, stored_v = k.clone(), v.clone()
        stored_k[:, here], stored_v[:, here] = rows.unbind(2)
        for dtype, to, ek, ev in ((torch.float32, truth, k, v), (case.dtype, yardstick, stored_k, stored_v)):
            s, a = (q.to(dtype) @ x.to(dtype).transpose(1, 2) for x in (ek, ak))
            p = torch.softmax(torch.where(exact, s, a).float() * case.scaling, -1)
            p = p.to(dtype)
            both = (p * exact) @ ev.to(dtype) + (p * ~exact) @ av.to(dtype)
            to[row] = both.float().flatten(0, 1)
    # Scores of the low-bit copy are rounded to float16.
    within_twice(out, yardstick, truth, slack=2e-3)
    assert torch.isneginf(work.best).all()
    if case.device.type == "cuda":
        torch.cuda.synchronize()
    for row, count in enumerate(case.counts):
        written = case.defined(case.form.pack(case.new_k[row].cpu(), case.new_v[row].cpu()))
        assert torch.equal(case.defined(store)[row, :, count - case.init], written)


@triton.jit
def _recode(x_ptr, codes, numbers, FORMAT: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    code = eight_bit.encode(tl.load(x_ptr + at), FORMAT)
    tl.store(codes + at, code)
    tl.store(numbers + at, eight_bit.decode(code, FORMAT))


def check_codes(device: str, dtype: torch.dtype) -> None:
    """Every finite half within the range, numbers between, and those half-way between two codes, as torch converts them."""
    form = StoreFormat(16, dtype)
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    codes = torch.arange(-128, 128).to(torch.int8).view(dtype).float()
    codes = codes[codes.isfinite() & (codes.abs() <= form.largest)].sort().values
    x = torch.cat([halves[halves.abs() <= form.largest], form.largest * (2 * torch.rand(2**13) - 1), codes,
                   (codes[1:] + codes[:-1]) / 2])  # fmt: skip
    x = torch.nn.functional.pad(x, (0, -len(x) % 1024)).to(device)
    found = torch.empty(len(x), dtype=torch.int8, device=device)
    numbers = torch.empty_like(x)
    _recode[(len(x) // 1024,)](x, found, numbers, FORMAT=form.code, BLOCK=1024)
    wanted = (x.round() if dtype == torch.int8 else x).to(dtype)
    assert torch.equal(found, wanted.view(torch.int8)) and torch.equal(numbers, wanted.float())


def check_hot_set(case: Case, sets: int, steps: int, union: bool = True) -> None:
    """Steps with a hot set equal steps without; what it holds and counts is what the reference does.

    In the middle, all places of the store get other tokens, as they do after a crop.
    """
    place = (case.b, case.h, sets, case.form, case.device)
    mine, theirs = HotSet(*place), HotSet(*place)
    for hot in (mine, theirs):
        hot.rows.view(torch.uint8).fill_(255)
    total, store = case.total.clone(), case.store()
    for step in range(steps):
        case.q = (0.9 * case.q.float() + torch.randn_like(case.q.float())).to(case.dtype)
        if step == steps // 2:
            for row, low in enumerate(case.lows):
                held = store.view(torch.uint8)[row, :, :low]
                held.copy_(held.flip(1))
            for hot in (mine, theirs):
                hot.clear()
                assert int((hot.tags >= 0).sum()) == 0
        work = run_pass(case, run=lowbit.lowbit_pass_reference)
        cut.cut_reference(work.tile_max, work.scores, work.best, work.ml, case.low, work.ids, work.counts, work.thresholds,
                          work.limits, work.chosen, 0, work.parts, case.scaling, INF, 1.0)  # fmt: skip
        selected = (case.q, work.ids, work.counts, work.thresholds, work.limits, work.scores, case.records)
        how = (0, case.scaling, *case.bits, union, False)
        without, found, wanted = case.work(), case.work(), case.work()
        gather.gather_attention(case.on_device(store), *selected, without.acc, without.ml, without.fetched, *how)
        for run, insert, hot, to in (
            (gather.gather_attention_hot, hot_set.insert_hot, mine, found),
            (gather.gather_attention_hot_reference, hot_set.insert_hot_reference, theirs, wanted),
        ):
            run(case.on_device(store), *selected, to.acc, to.ml, to.fetched, hot.rows, hot.tags, hot.stamps, hot.claims,
                hot.counts, to.staged, to.missed, total, *how)  # fmt: skip
            insert(to.staged, to.missed, total, hot.rows, hot.tags, hot.stamps, hot.claims)
        parts = found.gather_parts
        for x, y in zip(case.merged(found, 0, parts), case.merged(without, 0, parts), strict=True):
            assert torch.equal(x, y) and not x.isnan().any()
        assert torch.equal(found.fetched, without.fetched)
        for name in ("tags", "stamps", "claims", "counts"):
            assert torch.equal(getattr(mine, name), getattr(theirs, name)), name
        held = mine.tags.flatten(2) >= 0
        assert torch.equal(case.form.unpack(mine.rows)[held], case.form.unpack(theirs.rows)[held])
        assert int((found.missed >= 0).sum()) == int((wanted.missed >= 0).sum())
        total += 1
    lookups, hits = mine.counts.tolist()
    assert 0 < hits < lookups


CHECKS: dict[str, Callable[[Case], None]] = {
    "quantise": check_quantise,
    "extend": check_extend,
    "window": check_window,
    "low-bit pass": check_pass,
    "cut": lambda case: check_cut(case, INF, 1.0),
    "gather": lambda case: check_gather(case, True, True),
    "merge": check_merge,
    "step": check_step,
    "hot set": lambda case: check_hot_set(case, 3, 4),
}
"""Every operator once, and a step of all of them."""


def two_cases(device: torch.device | str) -> list[Case]:
    """Two small layers: the two precisions of a Llama-3 shape in bfloat16, and block means in float16. Random."""
    return [
        Case(128, 4, 2, 2, 8, [0, 130, 320], torch.bfloat16, device, cap=32),
        Case(64, 4, 0, 1, 3, [192, 70], torch.float16, device, cap=8),
    ]
