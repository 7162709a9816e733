"""What the decode kernels over blocks must do, on any device, like :mod:`~alaya_hf.kernels.gpu.checks`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from alaya_hf.kernels.gpu import block_scores, cut, gather_blocks, summarise, window
from alaya_hf.kernels.gpu.block_layout import BlockLayout
from alaya_hf.kernels.gpu.checks import INF, Case, plain, within_twice
from alaya_hf.kernels.gpu.coarse_step import CoarseWorkspace, coarse_step
from alaya_hf.kernels.gpu.layout import TILE

#: Block, strategy, representatives, mean values, most blocks per query head.
LAYOUTS = [
    (128, "representatives", 4, False, 1),
    (128, "mean", 1, True, 2),
    (16, "bounds", 1, False, 7),
    (64, "representatives", 3, False, 2),
    (32, "mean", 1, True, 3),
    (256, "bounds", 1, False, 1),
]


class BlockCase:
    """A layer's state as in :class:`~alaya_hf.kernels.gpu.checks.Case`, with blocks in place of the low-bit copy."""

    def __init__(self, case: Case, block: int, strategy: str, count: int, values: bool, cap: int) -> None:
        self.layout, self.case, self.cap = BlockLayout(case.d, block, strategy, count, values), case, cap
        self.how = (block, strategy, count, values)
        # Room for the tokens before the window's that share a block with them.
        case.ring = max(case.ring, case.local + max(TILE, block))
        self.capacity = -(-(max(case.lows) + TILE) // block) + 1
        self.summaries = self.poisoned()
        for row, low in enumerate(case.lows):
            made = self.layout.summarise(*(x[row, :, case.init : case.init + low] for x in (case.k, case.v)))
            self.summaries[row, :, : made.shape[1]] = made

    def poisoned(self) -> Tensor:
        """Summaries that are NaN everywhere."""
        case = self.case
        return self.layout.allocate(case.b, case.h, self.capacity * self.layout.tokens, case.device).fill_(float("nan"))

    def work(self) -> CoarseWorkspace:
        """Poisoned buffers."""
        case = self.case
        work = CoarseWorkspace(
            case.b, case.h, case.g, self.layout, self.capacity * self.layout.tokens, case.init + case.ring, self.cap,
            case.device, torch.float32,
        )  # fmt: skip
        for name, x in vars(work).items():
            if isinstance(x, Tensor) and name != "best":
                x.fill_(float("nan") if x.is_floating_point() else -77)
        return work

    def window(self) -> tuple[Tensor, Tensor]:
        """Also holds the last tokens in blocks, where the ring has room; other slots are NaN."""
        case = self.case
        keys, values = case.window()
        for row, low in enumerate(case.lows):
            for place in range(max(0, case.counts[row] - case.init - case.ring), low):
                slot, p = case.init + place % case.ring, case.init + place
                keys[row, :, slot], values[row, :, slot] = case.k[row, :, p], case.v[row, :, p]
        return keys, values

    def scored(self, run: Callable[..., None] = block_scores.block_scores_reference) -> CoarseWorkspace:
        """Scores on poisoned buffers; its partials are the first."""
        case, work = self.case, self.work()
        run(self.summaries, case.q, case.low, work.blocks, work.best, work.group_max, work.scores, work.acc, work.ml, 0,
            work.programs, case.scaling, self.layout.tokens, self.layout.strategy == "bounds", self.layout.values)  # fmt: skip
        return work

    def selected(self, beta: float = INF) -> CoarseWorkspace:
        """The same, and the blocks within the range and the cap."""
        work = self.scored()
        cut.cut_reference(work.group_max, work.scores, work.best, work.ml, work.blocks, work.ids, work.counts,
                          work.thresholds, work.limits, work.chosen, 0, 0, self.case.scaling, beta, 1.0)  # fmt: skip
        return work


def _alike(found: Tensor, wanted: Tensor) -> None:
    assert torch.equal(found.isnan(), wanted.isnan())
    torch.testing.assert_close(found, wanted, atol=2e-3, rtol=2e-3, equal_nan=True)


def check_summaries(blocks: BlockCase) -> None:
    """What stands for blocks of a chunk that begins with any block, and nothing else is touched."""
    case, found, wanted = blocks.case, blocks.poisoned(), blocks.poisoned()
    chunk = slice(case.init, case.init + max(case.lows))
    first = torch.arange(case.b, dtype=torch.int32, device=case.device) % 2
    for run, to in ((summarise.summarise_blocks, found), (summarise.summarise_blocks_reference, wanted)):
        run(case.k[:, :, chunk], case.v[:, :, chunk], to, first, case.low, *blocks.how)
    _alike(found, wanted)


def check_extend_blocks(blocks: BlockCase) -> None:
    """Rows whose window is full take 64 tokens into blocks, which are as if made at once; the others nothing."""
    case, work, (keys, values) = blocks.case, blocks.work(), blocks.window()
    arguments = (case.q, case.new_k, case.new_v, keys, values, None, case.total, case.low)
    window.window_attention(*arguments, work.best, work.acc, work.ml, 0, case.init, case.scaling)
    found, wanted, whole = (blocks.summaries.clone() for _ in range(3))
    for run, to in ((summarise.extend_blocks, found), (summarise.extend_blocks_reference, wanted)):
        run(keys, values, to, case.total, case.low, case.init, case.local, *blocks.how)
    low = case.low.clone()
    window.advance(case.total.clone(), low, case.init, case.local, blocks.capacity * blocks.layout.tokens)
    for row, after in enumerate(low.tolist()):
        made = blocks.layout.summarise(*(x[row, :, case.init : case.init + after] for x in (case.k, case.v)))
        whole[row, :, : made.shape[1]] = made
    for each in (found, wanted):
        _alike(each, whole)


def check_block_scores(blocks: BlockCase) -> None:
    """Scores, their maxima, best scores, blocks of each row, and the estimate of the attention to them."""
    found, wanted, case = blocks.scored(block_scores.block_scores), blocks.scored(), blocks.case
    assert torch.equal(found.blocks, wanted.blocks)
    for row, count in enumerate(wanted.blocks.tolist()):
        groups = -(-count // 64)
        for mine, theirs, used in ((found.scores, wanted.scores, count), (found.group_max, wanted.group_max, groups)):
            torch.testing.assert_close(mine[row, ..., :used], theirs[row, ..., :used], atol=2e-2, rtol=4e-3)
    torch.testing.assert_close(found.best, wanted.best, atol=2e-2, rtol=4e-3)
    if blocks.layout.values:
        (out, lse), (truth, true_lse) = (case.merged(work, 0, work.programs) for work in (found, wanted))  # type: ignore[arg-type]
        torch.testing.assert_close(out, truth, atol=1e-2, rtol=5e-3)
        torch.testing.assert_close(lse, true_lse, atol=1e-2, rtol=2e-3)


def check_gather_blocks(blocks: BlockCase, union: bool = True) -> None:
    """Exact terms in, estimates out; each block is fetched once."""
    case, work, results = blocks.case, blocks.selected(), []
    store, parts = case.on_device(case.store()), work.parts
    for run in (gather_blocks.gather_blocks, gather_blocks.gather_blocks_reference):
        to = blocks.work()
        # The estimates come along, so that what is taken out is there to be taken out of.
        to.acc[..., :parts, :], to.ml[..., :parts, :] = work.acc[..., :parts, :], work.ml[..., :parts, :]
        run(store, case.q, work.ids, work.counts, work.thresholds, work.limits, work.scores, blocks.summaries, case.low,
            to.acc, to.ml, to.fetched, parts, case.scaling, blocks.layout.tokens, union, blocks.layout.values)  # fmt: skip
        results.append((*case.merged(to, 0, parts + to.gather_parts), to.fetched.sum(-1)))  # type: ignore[arg-type]
    (out, lse, fetched), (truth, true_lse, wanted) = results
    assert torch.equal(fetched, wanted)
    torch.testing.assert_close(out, truth, atol=4e-3, rtol=3e-3)
    torch.testing.assert_close(lse, true_lse, atol=3e-3, rtol=1e-3)


def check_coarse_step(blocks: BlockCase, beta: float = INF, union: bool = True) -> None:
    """A whole step against one softmax over exact tokens and, with means, estimates, given the blocks that it selected."""
    case, work, (keys, values), store = blocks.case, blocks.work(), blocks.window(), blocks.case.store()
    block, before = blocks.layout.tokens, blocks.summaries.clone()
    coarse_step(work, case.q, case.new_k, case.new_v, keys, values, case.on_device(store), blocks.summaries, case.total,
                case.low, case.init, case.local, case.scaling, beta, union)  # fmt: skip
    truth, yardstick = torch.empty_like(work.out), torch.empty_like(work.out)
    for row, (count, low) in enumerate(zip(case.counts, case.lows, strict=True)):
        n = -(-low // block)
        assert (work.counts[row] <= min(blocks.cap, n)).all() and (
            beta < INF or (work.counts[row] == min(blocks.cap, n)).all()
        )
        asked = torch.zeros(case.h, case.g, n, dtype=torch.bool, device=case.device)
        for h in range(case.h):
            for g in range(case.g):
                asked[h, g, work.ids[row, h, g, : work.counts[row, h, g]].long()] = True
        asked = asked.any(1, keepdim=True).expand_as(asked) if union else asked
        exact = torch.ones(case.h, case.g, count + 1, dtype=torch.bool, device=case.device)
        exact[..., case.init : case.init + low] = asked.repeat_interleave(block, -1)[..., :low]
        k, v = case.k[row, :, : count + 1].float(), case.v[row, :, : count + 1].float()
        here = slice(case.init, case.init + low)
        stored_k, stored_v = k.clone(), v.clone()
        stored_k[:, here], stored_v[:, here] = case.form.unpack(case.form.pack(k[:, here], v[:, here])).unbind(2)
        q = case.q[row].view(case.h, case.g, case.d)
        for dtype, to, ek, ev in ((torch.float32, truth, k, v), (case.dtype, yardstick, stored_k, stored_v)):
            s = (q.to(dtype) @ ek.to(dtype).transpose(1, 2)).float().masked_fill(~exact, -INF) * case.scaling
            if blocks.layout.values:
                rough_k, rough_v = (before[row, :, :n, side].float() for side in (0, -1))
                sizes = (low - block * torch.arange(n, device=case.device)).clamp(0, block).float()
                estimate = (q.float() @ rough_k.transpose(1, 2)) * case.scaling + sizes.log()
                s = torch.cat([s, estimate.masked_fill(asked, -INF)], -1)
                ev = torch.cat([ev, rough_v], 1)
            to[row] = (torch.softmax(s, -1).to(dtype) @ ev.to(dtype)).float().flatten(0, 1)
    # Scores of blocks are rounded to float16.
    within_twice(work.out, yardstick, truth, slack=3e-3)
    assert torch.isneginf(work.best).all()


def check_everything(blocks: BlockCase) -> None:
    """With all blocks selected, a step equals dense attention."""
    case, cap = blocks.case, blocks.cap
    blocks.cap = blocks.capacity
    work, (keys, values) = blocks.work(), blocks.window()
    coarse_step(work, case.q, case.new_k, case.new_v, keys, values, case.on_device(case.store()), blocks.summaries,
                case.total, case.low, case.init, case.local, case.scaling, INF)  # fmt: skip
    blocks.cap = cap
    outs = []
    for dtype in (torch.float32, case.dtype):
        rows = [
            plain(
                case.q[row].view(case.h, case.g, -1),
                case.k[row, :, : count + 1],
                case.v[row, :, : count + 1],
                case.scaling,
                dtype,
            ).flatten(0, 1)  # fmt: skip
            for row, count in enumerate(case.counts)
        ]
        outs.append(torch.stack(rows))
    within_twice(work.out, outs[1], outs[0], slack=1e-3 if blocks.layout.values else 1e-5)
    for row, low in enumerate(case.lows):
        assert (work.fetched[row].sum(-1) == low).all()


def two_cases(device: torch.device | str) -> list[BlockCase]:
    """Two small layers: InfLLM's blocks in a Llama-3 shape in bfloat16, and Quest's pages in float16. Random."""
    return [
        BlockCase(Case(128, 4, 0, 2, 8, [0, 128, 320], torch.bfloat16, device, recent=103), *LAYOUTS[0]),
        BlockCase(Case(64, 4, 0, 1, 3, [192, 64], torch.float16, device, recent=103), *LAYOUTS[2]),
    ]


CHECKS: dict[str, Callable[[BlockCase], None]] = {
    "block summaries": check_summaries,
    "block extension": check_extend_blocks,
    "block scores": check_block_scores,
    "block gather": check_gather_blocks,
    "coarse step": check_coarse_step,
    "coarse step over everything": check_everything,
}
"""Every operator over blocks once, and steps of all of them."""
