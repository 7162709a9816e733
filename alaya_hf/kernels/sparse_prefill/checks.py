"""What tile-skipping attention must do, on any device: kernel against reference, both against dense attention.

Scores are small integers here, exact in every precision and order of addition, so that the tiles skipped have to be the
same ones. They assert, so they say nothing under ``python -O``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from alaya_hf.kernels.exact.plain import Plain
from alaya_hf.kernels.partial import Partial, merge
from alaya_hf.kernels.sparse_prefill.kernel import fetchable, launch, sparse_attention_kernel
from alaya_hf.kernels.sparse_prefill.reference import sparse_attention_reference
from alaya_hf.kernels.sparse_prefill.tiles import (
    K_TILE,
    Q_TILE,
    SparsePartial,
    TileRule,
    span,
    tile_counts,
    tile_maxima,
)
from alaya_hf.kernels.sparse_prefill.tuning import cuts, prefer


@dataclass(frozen=True)
class Case:
    """One call."""

    head_dim: int
    kv_heads: int
    group: int
    m: int
    n: int
    causal: bool
    dtype: torch.dtype
    batch: int = 1
    device: str = "cpu"

    @property
    def scaling(self) -> float:
        """Of a head with scores this large."""
        return 1 / 16

    def tensors(self, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of small integers, laid out as the package has them: no tensor is contiguous.

        Some stretches of keys are small, so that there is something to skip.
        """
        generator = torch.Generator().manual_seed(seed)

        def integers(*shape: int) -> Tensor:
            return torch.randint(-2, 3, shape, generator=generator).float()

        q = integers(self.batch, self.m, self.kv_heads * self.group, self.head_dim)
        kv = integers(self.batch, self.kv_heads, self.n, 2, self.head_dim)
        loud = torch.randint(0, 3, (self.batch, self.kv_heads, -(-self.n // 32)), generator=generator)
        kv[:, :, :, 0] *= loud.repeat_interleave(32, 2)[:, :, : self.n, None]
        q, kv = (x.to(self.device, self.dtype) for x in (q, kv))
        return q.transpose(1, 2), kv[:, :, :, 0], kv[:, :, :, 1]

    def rule(self, relative: bool, nothing: bool = False) -> TileRule:
        """A rule that skips some tiles, another one for each head and query tile."""
        shape = (self.kv_heads * self.group, tile_counts(self.m, self.n)[0])
        generator = torch.Generator().manual_seed(1)
        spread = torch.randint(0, 40, shape, generator=generator).float()
        limits = -5 - spread if relative else 20 + 2 * spread
        return TileRule((torch.full(shape, -math.inf) if nothing else limits).to(self.device), relative)

    def top(self) -> Tensor:
        """No scores seen so far."""
        return torch.full((self.batch, self.kv_heads * self.group, self.m), -math.inf, device=self.device)


def masked_dense(case: Case, q: Tensor, k: Tensor, v: Tensor, skipped: Tensor) -> Partial:
    """Dense attention in float32 to all that is visible and not in the skipped tiles (their map)."""
    m, n = case.m, case.n
    gone = skipped.bool().repeat_interleave(Q_TILE, 2)[:, :, :m].repeat_interleave(K_TILE, 3)[..., :n]
    keys, values = (x.float().repeat_interleave(case.group, 1) for x in (k, v))
    scores = (q.float() @ keys.transpose(2, 3)) * case.scaling
    if case.causal:
        gone = gone | ~torch.ones(m, n, dtype=torch.bool, device=q.device).tril(n - m)
    scores = scores.masked_fill(gone, -math.inf)
    return Partial(torch.nan_to_num(scores.softmax(-1)) @ values, scores.logsumexp(-1))


def naive_map(case: Case, q: Tensor, k: Tensor, rule: TileRule) -> Tensor:
    """Which tiles the rule skips, tile by tile and row by row as the definition reads."""
    rows, columns = tile_counts(case.m, case.n)
    heads = case.kv_heads * case.group
    found = torch.zeros(case.batch, heads, rows, columns, dtype=torch.uint8)
    keys = k.float().repeat_interleave(case.group, 1)
    scores = (q.float() @ keys.transpose(2, 3)).cpu()
    if case.causal:
        scores = scores.masked_fill(~torch.ones(case.m, case.n, dtype=torch.bool).tril(case.n - case.m), -math.inf)
    for b in range(case.batch):
        for head in range(heads):
            for i in range(rows):
                full, end = span(i, case.m, case.n, case.causal)
                block = scores[b, head, i * Q_TILE : (i + 1) * Q_TILE]
                limit = float(rule.limits[head, i])
                running = (
                    block[:, full * K_TILE : end * K_TILE].amax(1)
                    if end > full
                    else torch.full((len(block),), -math.inf)
                )
                for j in range(full):
                    best = block[:, j * K_TILE : (j + 1) * K_TILE].amax(1)
                    skip = bool((best < running + limit).all()) if rule.relative else float(best.max()) < limit
                    found[b, head, i, j] = skip
                    if not skip:
                        running = torch.maximum(running, best)
    return found


def both(
    case: Case, q: Tensor, k: Tensor, v: Tensor, rule: TileRule | None, top: Tensor | None
) -> tuple[SparsePartial, SparsePartial]:
    """Kernel and reference, which raise `top` alike."""
    other = None if top is None else top.clone()
    found = sparse_attention_kernel(q, k, v, rule, case.scaling, case.causal, top, True)
    wanted = sparse_attention_reference(q, k, v, rule, case.scaling, case.causal, other, True)
    if top is not None and other is not None:
        torch.testing.assert_close(top, other, atol=1e-3, rtol=1e-4)
    return found, wanted


def close(found: Partial, wanted: Partial, dtype: torch.dtype) -> None:
    """As near as rounding the weights to `dtype` allows; values are at most 2."""
    assert torch.equal(torch.isneginf(found.lse), torch.isneginf(wanted.lse))
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(found.out, wanted.out, atol=4 * step, rtol=0)
    torch.testing.assert_close(found.lse, wanted.lse, atol=1e-4, rtol=1e-5)


def check_skipping(case: Case, relative: bool) -> None:
    """Kernel and reference skip the tiles of the definition, and attend to all the others."""
    q, k, v = case.tensors()
    rule = case.rule(relative)
    found, wanted = both(case, q, k, v, rule, case.top() if relative else None)
    expected = naive_map(case, q, k, rule).to(q.device)
    for each in (found, wanted):
        assert each.map is not None
        assert torch.equal(each.map, expected)
        assert torch.equal(each.skipped, expected.sum(-1, dtype=torch.int32)) and int(each.skipped.sum()) <= each.tiles
        close(each.partial, masked_dense(case, q, k, v, expected), case.dtype)


def check_nothing_skipped(case: Case, relative: bool) -> None:
    """With limits of -inf, and without a rule, it is dense attention: error at most twice that of plain low precision."""
    q, k, v = (2 * torch.randn_like(x) for x in case.tensors())
    found, wanted = both(case, q, k, v, case.rule(relative, nothing=True), case.top() if relative else None)
    dense = both(case, q, k, v, None, None)
    truth = Plain().run(q.float(), k.float(), v.float(), case.scaling, case.causal, None, None)
    assert not int(found.skipped.sum()) and not int(wanted.skipped.sum())
    keys, values = (x.repeat_interleave(case.group, 1) for x in (k, v))
    scores = (q @ keys.transpose(2, 3)).float() * case.scaling
    if case.causal:
        visible = torch.ones(case.m, case.n, dtype=torch.bool, device=q.device).tril(case.n - case.m)
        scores = scores.masked_fill(~visible, -math.inf)
    plain = (torch.nan_to_num(scores.softmax(-1)).to(case.dtype) @ values).float()
    for each in (found, wanted, *dense):
        assert (each.partial.out - truth.out).abs().max() <= 2 * (plain - truth.out).abs().max() + 1e-5
        torch.testing.assert_close(each.partial.lse, truth.lse, atol=1e-3, rtol=1e-4)


def check_blocks(case: Case, relative: bool) -> None:
    """A context in blocks, the diagonal first: kernel and reference agree on each, their merge is all that was not skipped."""
    q, k, v = case.tensors()
    old = case.n - case.m
    cut = old // 2 // K_TILE * K_TILE + 17
    top = case.top() if relative else None
    parts, gone = [], torch.zeros(*q.shape[:2], case.m, case.n, dtype=torch.bool, device=q.device)
    for start, stop, causal in ((old, case.n, True), (0, cut, False), (cut, old, False)):
        block = Case(
            case.head_dim, case.kv_heads, case.group, case.m, stop - start, causal, case.dtype, case.batch, case.device
        )
        found, wanted = both(block, q, k[:, :, start:stop], v[:, :, start:stop], block.rule(relative), top)
        assert found.map is not None and wanted.map is not None and torch.equal(found.map, wanted.map)
        close(found.partial, wanted.partial, case.dtype)
        parts.append(found.partial)
        tiles = found.map.bool().repeat_interleave(Q_TILE, 2)[:, :, : case.m].repeat_interleave(K_TILE, 3)
        gone[..., start:stop] = tiles[..., : stop - start]
    keys, values = (x.float().repeat_interleave(case.group, 1) for x in (k, v))
    scores = (q.float() @ keys.transpose(2, 3)) * case.scaling
    gone |= ~torch.ones(case.m, case.n, dtype=torch.bool, device=q.device).tril(old)
    assert bool(gone[..., :old].any())
    scores = scores.masked_fill(gone, -math.inf)
    close(merge(parts), Partial(scores.softmax(-1) @ values, scores.logsumexp(-1)), case.dtype)


def check_poison(case: Case) -> None:
    """Every element of the outputs is written, whatever they held; all skipped is the empty partial."""
    q, k, v = case.tensors()
    batch, heads, m, d = q.shape
    rows, columns = tile_counts(m, case.n)
    limits = torch.full((heads, rows), math.inf, device=q.device)
    out = torch.full((batch, heads, m, d), math.nan, device=q.device)
    lse = torch.full((batch, heads, m), math.nan, device=q.device)
    skipped = torch.full((batch, heads, rows), -77, dtype=torch.int32, device=q.device)
    q, k, v = (fetchable(x) for x in (q, k, v))
    launch(q, k, v, limits, None, out, lse, skipped, None, case.scaling, case.causal, False)
    wanted = sparse_attention_reference(q, k, v, TileRule(limits), case.scaling, case.causal, None, False)
    assert torch.equal(skipped, wanted.skipped) and not out.isnan().any()
    close(Partial(out, lse), wanted.partial, case.dtype)
    if not case.causal:
        assert torch.isneginf(lse).all() and (out == 0).all()


def check_operator(case: Case) -> None:
    """It writes what it says it writes, and traces."""
    q, k, v = case.tensors()
    batch, heads, m, d = q.shape
    rows, columns = tile_counts(m, case.n)
    q, k, v = (fetchable(x) for x in (q, k, v))
    out, lse = torch.zeros(batch, heads, m, d, device=q.device), torch.zeros(batch, heads, m, device=q.device)
    skipped = torch.zeros(batch, heads, rows, dtype=torch.int32, device=q.device)
    record = torch.zeros(batch, heads, rows, columns, dtype=torch.uint8, device=q.device)
    for relative in (False, True):
        top = case.top() if relative else None
        arguments = (q, k, v, case.rule(relative).limits, top, out, lse, skipped, record if relative else None)
        torch.library.opcheck(
            launch,
            (*arguments, case.scaling, case.causal, relative),
            test_utils=("test_schema", "test_faketensor"),
        )


def check_maxima(case: Case) -> None:
    """Thresholds between the tile maxima keep as many tiles as there are maxima above them."""
    q, k, v = case.tensors()
    maxima = tile_maxima(q, k, case.causal)
    limits = maxima[0].flatten(1).amax(1, keepdim=True).expand(-1, maxima.shape[2]).contiguous() - 1
    limits = limits.clamp(min=-1e9)
    rule = TileRule(limits)
    found = sparse_attention_kernel(q, k, v, rule, case.scaling, case.causal, None, True)
    for row in range(case.batch):
        kept = (maxima[row] >= limits[:, :, None]).sum(-1)
        there = (~torch.isneginf(maxima[row])).sum(-1)
        assert torch.equal(there - kept, found.skipped[row].long())


def check_cuts(case: Case) -> None:
    """However the kernel is cut, it skips the same tiles and attends to the others."""
    for skips in (True, False):
        before = cuts(case.head_dim, skips)
        try:
            for cut in before:
                prefer(case.head_dim, skips, cut)
                if skips:
                    check_skipping(case, True)
                else:
                    check_nothing_skipped(case, False)
        finally:
            prefer(case.head_dim, skips, before[0])


def check_layouts(case: Case) -> None:
    """Keys and values that descriptors of memory cannot say are copied first: odd addresses and strides, repeated heads."""
    q, k, v = case.tensors()
    wanted = sparse_attention_reference(q, k, v, None, case.scaling, case.causal, None, False).partial

    def odd(x: Tensor) -> Tensor:
        wide = torch.zeros(*x.shape[:3], x.shape[3] + 3, dtype=x.dtype, device=x.device)
        wide[..., 1 : 1 + x.shape[3]] = x
        return wide[..., 1 : 1 + x.shape[3]]

    transposed = k.transpose(2, 3).contiguous().transpose(2, 3)
    for keys, values in ((odd(k), odd(v)), (transposed, v), (k, v.transpose(1, 2).contiguous().transpose(1, 2))):
        found = sparse_attention_kernel(q, keys, values, None, case.scaling, case.causal, None, False).partial
        close(found, wanted, case.dtype)
    one = (k[:, :1].expand(-1, case.kv_heads, -1, -1), v[:, :1].expand(-1, case.kv_heads, -1, -1))
    wanted = sparse_attention_reference(q, *one, None, case.scaling, case.causal, None, False).partial
    close(sparse_attention_kernel(q, *one, None, case.scaling, case.causal, None, False).partial, wanted, case.dtype)
