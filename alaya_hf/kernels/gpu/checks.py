"""What the decode kernels must do, on any device: each check runs a kernel on poisoned buffers against its reference.

The tests run them over many shapes, `alaya-hf doctor` over two. They assert, so they say nothing under ``python -O``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from alaya_hf.kernels.gpu import (
    append,
    cut,
    eight_bit,
    gather,
    hot_set,
    lowbit,
    merge,
    quantise,
    short_pass,
    window,
    window_rows,
)
from alaya_hf.kernels.gpu.hot_set import HotSet
from alaya_hf.kernels.gpu.layout import TILE, Layout
from alaya_hf.kernels.gpu.prefix import Prefix
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
        self.positions = 1
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

    def split(self, store: Tensor) -> tuple[Tensor, Prefix]:
        """A store, on the host, without a run of places that lies elsewhere, and that run; each row has its own."""
        own, shape = torch.full_like(store, float("nan")), (self.h, 300 * self.b, *self.form.tail)
        rows = torch.full(shape, float("nan"), dtype=store.dtype, pin_memory=self.device.type == "cuda")
        if own.is_cuda or self.device.type == "cuda":
            own = own.pin_memory()
        bounds = []
        for row, count in enumerate(self.counts):
            held, at = count - self.init, 300 * row + 7
            first = min(5, held)
            last = min(first + 60 + 70 * row, held)
            rows[:, at : at + last - first] = store[row, :, first:last]
            own[row, :, :first], own[row, :, first : held - last + first] = (
                store[row, :, :first],
                store[row, :, last:held],
            )
            bounds.append([first, last, at - first])
        return own, Prefix(self.on_device(rows), torch.tensor(bounds, device=self.device))

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
    error, known = float((found.float() - truth).abs().max()), float((yardstick.float() - truth).abs().max())
    assert error <= 2 * known + slack, f"off by {error:.3g}, the yardstick by {known:.3g}, slack {slack:.3g}"


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
        case.scaling, beta, *case.bits, case.positions)  # fmt: skip
    return work


def check_pass(case: Case, beta: float = INF) -> None:
    """Scores, tile maxima, best scores and attention of every token of the low-bit copy."""
    found, wanted = run_pass(case, beta), run_pass(case, run=lowbit.lowbit_pass_reference)
    out, lse = case.merged(found, 0, found.parts)
    truth, true_lse = case.merged(wanted, 0, wanted.parts)
    keys, values = case.layout.unpack(case.records)
    yardstick, best = torch.zeros_like(truth), wanted.best
    largest = spread = 0.0
    for row, low in enumerate(case.lows):
        k, v = keys[row, :, :low], values[row, :, :low]
        q = case.q[row].view(case.h, case.g, case.d)
        if low == 0:
            assert torch.isneginf(lse[row]).all() and (out[row] == 0).all()
            continue
        yardstick[row] = plain(q, k, v, case.scaling, case.dtype).flatten(0, 1)
        exact = q.float() @ k.transpose(1, 2)
        largest, spread = max(largest, float(exact.abs().max())), max(spread, float(v.std()))
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
    # A score is kept in float16, whose rounding moves the token's weight.
    within_twice(out, yardstick, truth, slack=1e-3 + 2**-11 * case.scaling * largest * spread)
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
        # With the pass's terms: alone, exact minus approximate ones may have next to no weight.
        to.acc[..., : work.parts, :], to.ml[..., : work.parts, :] = (
            x[..., : work.parts, :] for x in (work.acc, work.ml)
        )
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
        x for to in (found, reference) for x in case.merged(to, 0, work.parts + wanted.gather_parts)
    )
    torch.testing.assert_close(out, truth, atol=3e-3, rtol=2e-3)
    torch.testing.assert_close(lse, true_lse, atol=2e-3, rtol=1e-3)


def check_prefix(case: Case) -> None:
    """A store of which a run lies elsewhere answers as the whole one does, with a hot set and without; new tokens go behind."""
    if case.form.scaled:
        return
    work = run_pass(case, run=lowbit.lowbit_pass_reference)
    cut.cut_reference(work.tile_max, work.scores, work.best, work.ml, case.low, work.ids, work.counts, work.thresholds,
                      work.limits, work.chosen, 0, work.parts, case.scaling, INF, 1.0)  # fmt: skip
    whole = case.store()
    own, prefix = case.split(whole)
    selected = (case.q, work.ids, work.counts, work.thresholds, work.limits, work.scores, case.records)
    how, parts = (0, case.scaling, *case.bits, True, False), work.gather_parts
    plain_, found, reference, hot_found, some, some_reference = (case.work() for _ in range(6))
    # The selected rows alone, in the order of the ids, none where they lie in the own store.
    there = torch.arange(work.ids.shape[3], device=work.ids.device) < work.counts.unsqueeze(-1)
    inside = there & (work.ids >= prefix.bounds[:, :1, None, None]) & (work.ids < prefix.bounds[:, 1:2, None, None])
    rows = whole.to(case.device)[
        torch.arange(case.b, device=case.device)[:, None, None, None],
        torch.arange(case.h, device=case.device)[:, None, None],
        torch.where(inside, work.ids, 0).long(),
    ]
    rows = torch.where(inside[..., None, None], rows, float("nan")).cpu().contiguous()
    rows = case.on_device(rows.pin_memory() if case.device.type == "cuda" else rows)
    for run, to, store, where in (
        (gather.gather_attention, plain_, whole, (None, None)),
        (gather.gather_attention, found, own, prefix[:2]),
        (gather.gather_attention_reference, reference, own, prefix[:2]),
        (gather.gather_attention, some, own, (rows, prefix.bounds)),
        (gather.gather_attention_reference, some_reference, own, (rows, prefix.bounds)),
    ):
        run(case.on_device(store), *selected, to.acc, to.ml, to.fetched, *how, 1, *where)
    hot = HotSet(case.b, case.h, 3, case.form, case.device)
    for total in (case.total, case.total + 1):  # the second time some of it is hot
        gather.gather_attention_hot(
            case.on_device(own), *selected, hot_found.acc, hot_found.ml, hot_found.fetched, hot.rows, hot.tags, hot.stamps,
            hot.claims, hot.counts, hot_found.staged, hot_found.missed, total, *how, *prefix[:2],
        )  # fmt: skip
        hot_set.insert_hot(hot_found.staged, hot_found.missed, total, hot.rows, hot.tags, hot.stamps, hot.claims)
        for mine, theirs in zip(case.merged(hot_found, 0, parts), case.merged(plain_, 0, parts), strict=True):
            assert torch.equal(mine, theirs)
    results = (case.merged(x, 0, parts) for x in (found, plain_, some, reference, some_reference))
    for mine, theirs, selected_, true, true_ in zip(*results, strict=True):
        assert torch.equal(mine, theirs) and torch.equal(mine, selected_) and torch.equal(true, true_)
        torch.testing.assert_close(mine, true, atol=3e-3, rtol=2e-3)
    keys, values = case.window()
    for run in (window.window_attention, window.window_attention_reference):
        store = own.clone().pin_memory() if case.device.type == "cuda" else own.clone()
        run(case.q, case.new_k, case.new_v, keys, values, case.on_device(store), case.total, case.low, work.best, work.acc,
            work.ml, 0, case.init, case.scaling, prefix.bounds)  # fmt: skip
        if case.device.type == "cuda":
            torch.cuda.synchronize()
        for row, (first, last, _) in enumerate(prefix.bounds.tolist()):
            line = case.counts[row] - case.init - (last - first)
            assert torch.equal(store[row, :, line], case.form.pack(case.new_k[row].cpu(), case.new_v[row].cpu()))
            assert torch.equal(store[row, :, :line], own[row, :, :line])


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


def _mixed(
    case: Case, row: int, q: Tensor, k: Tensor, v: Tensor, ids: Tensor, counts: Tensor, union: bool
) -> tuple[Tensor, Tensor]:
    """One softmax over exact and approximate terms, given the selection: in float32 and in low precision, ``[heads, d]``.

    Parameters
    ----------
    q : Tensor ``[kv_heads, group, d]``
    k, v : Tensor ``[kv_heads, n, d]``
        Everything that it may see.
    ids, counts : Tensor ``[kv_heads, group, cap]`` and ``[kv_heads, group]``
    """
    rough_k, rough_v = case.layout.unpack(case.records)
    low, here = case.lows[row], slice(case.init, case.init + case.lows[row])
    k, v = k.float(), v.float()
    ak, av = k.clone(), v.clone()
    ak[:, here], av[:, here] = rough_k[row, :, :low], rough_v[row, :, :low]
    exact = torch.ones(case.h, case.g, k.shape[1], dtype=torch.bool, device=case.device)
    exact[:, :, here] = False
    for h in range(case.h):
        for g in range(case.g):
            exact[h, g, case.init + ids[h, g, : counts[h, g]].long()] = True
    if union:
        exact = exact.any(1, keepdim=True).expand_as(exact)
    # What a plain implementation would read from the store.
    rows = case.form.unpack(case.form.pack(k[:, here], v[:, here]))
    stored_k, stored_v = k.clone(), v.clone()
    stored_k[:, here], stored_v[:, here] = rows.unbind(2)
    found = []
    for dtype, ek, ev in ((torch.float32, k, v), (case.dtype, stored_k, stored_v)):
        s, a = (q.to(dtype) @ x.to(dtype).transpose(1, 2) for x in (ek, ak))
        p = torch.softmax(torch.where(exact, s, a).float() * case.scaling, -1).to(dtype)
        found.append(((p * exact) @ ev.to(dtype) + (p * ~exact) @ av.to(dtype)).float().flatten(0, 1))
    return found[0], found[1]


def check_step(case: Case, beta: float = INF, ratio: float = 1.0, union: bool = True) -> None:
    """A whole step against one softmax over exact and approximate terms, given the selection it made."""
    work, (keys, values), store = case.work(), case.window(), case.store()
    view = case.on_device(store)
    out = decode_step(work, case.q, case.new_k, case.new_v, keys, values, view, case.records, case.total, case.low,
                      case.init, case.local, case.scaling, beta, ratio, union)  # fmt: skip
    truth, yardstick = torch.empty_like(work.out), torch.empty_like(work.out)
    for row, count in enumerate(case.counts):
        k, v = case.k[row, :, : count + 1], case.v[row, :, : count + 1]
        q, ids, counts = case.q[row].view(case.h, case.g, case.d), work.ids[row], work.counts[row]
        truth[row], yardstick[row] = _mixed(case, row, q, k, v, ids, counts, union)
    # Scores of the low-bit copy are rounded to float16.
    within_twice(out, yardstick, truth, slack=2e-3)
    assert torch.isneginf(work.best).all()
    if case.device.type == "cuda":
        torch.cuda.synchronize()
    for row, count in enumerate(case.counts):
        written = case.defined(case.form.pack(case.new_k[row].cpu(), case.new_v[row].cpu()))
        assert torch.equal(case.defined(store)[row, :, count - case.init], written)


def _more(case: Case, new: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of new tokens: ``[batch, heads or kv_heads, new, d]``."""
    q = (2 * torch.randn(case.b, case.h * case.g, new, case.d, device=case.device)).to(case.dtype)
    k, v = (torch.randn(case.b, case.h, new, case.d, device=case.device).to(case.dtype) for _ in "kv")
    return q, k, v


def _pass_work(case: Case, new: int, positions: int) -> Workspace:
    slots = case.init + case.ring
    work = Workspace(case.b, case.h, case.g, case.layout, TILES * TILE, slots, case.cap, case.device, torch.float32,
                     new=new, positions=positions)  # fmt: skip
    # What leaves the window has the model's precision.
    work.left_k, work.left_v = work.left_k.to(case.dtype), work.left_v.to(case.dtype)
    for name, x in vars(work).items():
        if isinstance(x, Tensor) and name != "best":
            x.fill_(float("nan") if x.is_floating_point() else -77)
    return work


def check_window_rows(case: Case, new: int = 5, first: int = 2, positions: int = 2) -> None:
    """Some positions of a pass: the window as it was, and the new tokens up to each."""
    q, k, v = _more(case, new)
    rows = q[:, :, first : first + positions].unflatten(1, (case.h, case.g)).transpose(2, 3).flatten(1, 3).contiguous()
    found, wanted = _pass_work(case, new, positions), _pass_work(case, new, positions)
    for run, work in (
        (window_rows.window_rows_attention, found), (window_rows.window_rows_attention_reference, wanted),
    ):  # fmt: skip
        run(rows, k, v, *case.window(), case.total, case.low, work.best, work.acc, work.ml, 0, case.init, first, positions,
            case.scaling)  # fmt: skip
    (out, lse), (truth, true_lse) = (case.merged(work, 0, work.window_parts) for work in (found, wanted))
    torch.testing.assert_close(out, truth, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(lse, true_lse, atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(found.best, wanted.best, atol=2e-2, rtol=2e-3)


def check_append(case: Case, new: int = 70) -> None:
    """Window, store and low-bit copy are those that single steps leave behind, and so are the numbers.

    Between steps the low-bit copy holds whole tiles: each row begins with those of ``case``'s.
    """
    lows, recent = [low // TILE * TILE for low in case.lows], case.counts[0] - case.init - case.lows[0]
    case = Case(case.d, *case.bits, case.h, case.g, lows, case.dtype, case.device, case.cap, case.init, case.local, recent,
                case.form.dtype)  # fmt: skip
    _, k, v = _more(case, new)
    room = TILES * TILE
    (keys, values), (step_keys, step_values) = case.window(), case.window()
    shape = (case.b, case.h, max(case.counts) + new, *case.form.tail)
    stores = [torch.zeros(shape, dtype=case.form.dtype, pin_memory=case.device.type == "cuda") for _ in range(2)]
    views = [case.on_device(store) for store in stores]
    records = [case.records.clone() for _ in range(2)]
    work = _pass_work(case, new, 1)
    append.append_tokens(k, v, keys, values, views[0], records[0], case.total, case.low, work.left_k, work.left_v,
                         work.first_tile, work.leaving, case.init, case.local, *case.bits)  # fmt: skip
    total, low, step = case.total.clone(), case.low.clone(), case.work()
    for i in range(new):
        window.window_attention_reference(case.q, k[:, :, i], v[:, :, i], step_keys, step_values, views[1], total, low, step.best,
                                          step.acc, step.ml, 0, case.init, case.scaling)  # fmt: skip
        quantise.extend_lowbit(step_keys, step_values, records[1], total, low, case.init, case.local, *case.bits)
        window.advance(total, low, case.init, case.local, room)
    counted = case.total.clone(), case.low.clone()
    window.advance(*counted, case.init, case.local, room, new)
    assert torch.equal(counted[0], total) and torch.equal(counted[1], low)
    if case.device.type == "cuda":
        torch.cuda.synchronize()
    assert torch.equal(case.defined(stores[0]), case.defined(stores[1]))
    for row, (count, begin) in enumerate(zip(total.tolist(), low.tolist(), strict=True)):
        held = [*range(case.init), *(case.init + place % case.ring for place in range(begin, count - case.init))]
        for mine, theirs in ((keys, step_keys), (values, step_values)):
            assert torch.equal(mine[row][:, held], theirs[row][:, held]) and not mine[row][:, held].isnan().any()
        for mine, theirs in zip(*(case.layout.unpack(x) for x in records), strict=True):
            x, y = mine[row, :, :begin], theirs[row, :, :begin]
            # The same arithmetic in two kernels: a compiler may round a scale otherwise, and with it a code now and then.
            assert begin == 0 or ((x - y).abs() <= 1e-3 * y.abs().clamp_min(1)).float().mean() > 0.99


def check_short_pass(case: Case, new: int = 5, positions: int = 2, beta: float = INF, union: bool = True) -> None:
    """Every position of a pass against one softmax over exact and approximate terms, given the selection it made."""
    q, k, v = _more(case, new)
    work, (keys, values), store = _pass_work(case, new, positions), case.window(), case.store()
    store = torch.cat([store, torch.zeros_like(store[:, :, :1]).expand(-1, -1, new, *case.form.tail)], 2)
    view = case.on_device(store.pin_memory() if case.device.type == "cuda" else store)
    chosen: list[tuple[Tensor, Tensor]] = []

    def watch(part: Workspace, first: int) -> None:
        shape = (case.b, case.h, part.positions, case.g)
        ids, counts = part.ids.view(*shape, case.cap), part.counts.view(shape)
        chosen.extend(zip(ids.clone().unbind(2), counts.clone().unbind(2), strict=True))

    out, lse = short_pass.short_pass(work, q, k, v, keys, values, view, case.records.clone(), case.total, case.low, case.init,
                                     case.local, case.scaling, beta, 1.0, union, watch)  # fmt: skip
    assert len(chosen) == new and not lse.isnan().any() and torch.isneginf(work.best).all()
    truth, yardstick = torch.empty_like(out), torch.empty_like(out)
    for position, (ids, counts) in enumerate(chosen):
        for row, count in enumerate(case.counts):
            seen_k, seen_v = (
                torch.cat([x[row, :, :count], y[row, :, : position + 1]], 1) for x, y in ((case.k, k), (case.v, v))
            )
            queries = q[row, :, position].view(case.h, case.g, case.d)
            found = _mixed(case, row, queries, seen_k, seen_v, ids[row], counts[row], union)
            truth[row, :, position], yardstick[row, :, position] = found
            assert case.lows[row] == 0 or beta < INF or (counts[row] == min(case.cap, case.lows[row])).all()
    within_twice(out, yardstick, truth, slack=2e-3)


def check_pass_of_many_rows(case: Case, positions: int, beta: float = INF) -> None:
    """The low-bit pass over the rows of several positions: :func:`check_pass` of a case whose heads they are."""
    many = copy.copy(case)
    many.g, many.positions, many.cap = case.g * positions, positions, 1  # the gather is not asked
    many.q = (2 * torch.randn(case.b, case.h * many.g, case.d, device=case.device)).to(case.dtype)
    check_pass(many, beta)


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
    "window of a short pass": check_window_rows,
    "append": lambda case: check_append(case, 24),
    "short pass": check_short_pass,
    "hot set": lambda case: check_hot_set(case, 3, 4),
    "prefix": check_prefix,
}
"""Every operator once, and a step of all of them."""


def two_cases(device: torch.device | str) -> list[Case]:
    """Two small layers: the two precisions of a Llama-3 shape in bfloat16, and block means in float16. Random."""
    return [
        Case(128, 4, 2, 2, 8, [0, 130, 320], torch.bfloat16, device, cap=32),
        Case(64, 4, 0, 1, 3, [192, 70], torch.float16, device, cap=8),
    ]
