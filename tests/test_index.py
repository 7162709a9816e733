"""Indexes against exact search."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alaya_hf import DIPR, AlayaConfig, Coarse, Flat, Graph, Quantized, Recovery, Sign, TopK
from alaya_hf.engine.plan import Plan
from alaya_hf.engine.residual.none import NoResidual
from alaya_hf.engine.retrieval import _search
from alaya_hf.errors import ConfigError, NonFiniteError
from alaya_hf.storage import Piece, Segment

HEADS, GROUP, DIM = 2, 3, 32
SCALING = DIM**-0.5


def segment_of(tokens: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Segment:
    """Keys in clusters, so that some stand out for a query, with a few strong channels as models have."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(HEADS, 12, DIM, generator=generator) * 2
    keys = centres[:, torch.randint(12, (tokens,), generator=generator)]
    keys = keys + 0.7 * torch.randn(HEADS, tokens, DIM, generator=generator)
    keys[..., :2] += 5
    segment = Segment(HEADS, DIM, dtype)
    segment.append(keys, torch.randn(HEADS, tokens, DIM, generator=generator))
    segment.add_samples(centres.repeat(1, 4, 1) + 0.3 * torch.randn(HEADS, 48, DIM, generator=generator))
    return segment


def queries(seed: int = 1) -> torch.Tensor:
    return 2 * torch.randn(HEADS, GROUP, DIM, generator=torch.Generator().manual_seed(seed))


def exact(segment: Segment, q: torch.Tensor, tokens: int) -> torch.Tensor:
    return q @ segment.kv[:, :tokens, 0].float().transpose(1, 2)


def search(segment: Segment, index, query, q: torch.Tensor, best: float = -float("inf"), tokens: int | None = None):
    tokens = segment.used if tokens is None else tokens
    top = torch.full((HEADS, GROUP), best)
    return segment.searcher(index).search(q, segment.kv[:, :tokens], query, top, SCALING, top.clone())


def dense(hits, tokens: int) -> torch.Tensor:
    found = torch.zeros(HEADS, GROUP, tokens, dtype=torch.bool)
    for head in range(HEADS):
        begin, end = int(hits.offsets[head]), int(hits.offsets[head + 1])
        ids = hits.ids[begin:end].long()
        assert torch.equal(ids, ids.sort().values) and ids.unique().numel() == ids.numel()
        found[head, :, ids] = hits.mask[:, begin:end].bool()
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 1000])
@pytest.mark.parametrize("best", [-float("inf"), 40.0])
def test_flat_is_exact(tokens, dtype, best):
    segment, q = segment_of(tokens, dtype=dtype), queries()
    scores = exact(segment, q, tokens)
    top = scores.amax(-1, keepdim=True).clamp(min=best)
    query = DIPR(alpha=0.05)
    # Scores that tie with the cut up to rounding may fall either way.
    cut = top - query.range(SCALING)
    clear = (scores - cut).abs() > 1e-3
    assert torch.equal(dense(search(segment, Flat(), query, q, best), tokens)[clear], (scores >= cut)[clear])
    k = min(7, tokens)
    kept = dense(search(segment, Flat(), TopK(7), q), tokens)
    assert (kept.sum(-1) == k).all()
    assert (scores.masked_fill(~kept, 1e9).amin(-1) >= scores.masked_fill(kept, -1e9).amax(-1) - 1e-3).all()


@pytest.mark.parametrize("query", [DIPR(alpha=0.05), TopK(20)], ids=str)
@pytest.mark.parametrize(
    ("index", "least"), [(Quantized(8), 0.995), (Quantized(4), 0.97), (Quantized(2), 0.8), (Sign(), 0.95)], ids=str
)
def test_quantized_recall_and_no_false_hits(query, index, least):
    found = wanted = 0
    for seed in range(8):
        segment, q = segment_of(1500, seed), queries(seed)
        truth = dense(search(segment, Flat(), query, q), 1500)
        ours = dense(search(segment, index, query, q), 1500)
        found, wanted = found + int((ours & truth).sum()), wanted + int(truth.sum())
        if isinstance(query, DIPR):
            # Re-scored hits are within the range of the best one found, so none is further than exact search allows
            # unless the best itself was missed.
            same_best = (ours & truth & (exact(segment, q, 1500) == exact(segment, q, 1500).amax(-1, True))).any(-1)
            assert not (ours & ~truth)[same_best].any()
    assert found / wanted >= least


@pytest.mark.parametrize("index", [Flat(), Quantized(8), Quantized(4), Sign(), Graph(degree=12)], ids=str)
def test_a_cap_keeps_the_best_of_the_range(index):
    capped = 0
    for seed in range(4):
        segment, q = segment_of(1500, seed), queries(seed)
        scores = exact(segment, q, 1500)
        whole = dense(search(segment, index, DIPR(alpha=0.001), q), 1500)
        best = dense(search(segment, index, DIPR(alpha=0.001, cap=6), q), 1500)
        assert (best.sum(-1) <= 6).all() and (best.sum(-1) == whole.sum(-1).clamp(max=6)).float().mean() > 0.8
        if isinstance(index, (Flat, Graph)):
            left = scores.masked_fill(~whole | best, -1e9).amax(-1)
            assert not (best & ~whole).any() and (scores.masked_fill(~best, 1e9).amin(-1) >= left).all()
        capped += int((whole.sum(-1) > 6).sum())
    assert capped  # otherwise the cap was never reached


def test_recovery_keeps_its_share():
    segment, q = segment_of(2000), queries()
    mass = (exact(segment, q, 2000) * SCALING).softmax(-1)
    for ratio in (0.5, 0.9, 0.99):
        kept = dense(search(segment, Flat(), Recovery(ratio), q), 2000)
        assert ((mass * kept).sum(-1) >= ratio - 1e-4).all()
        # Without its lightest token the share would not be reached: no more than needed.
        lightest = mass.masked_fill(~kept, 2).amin(-1)
        assert ((mass * kept).sum(-1) - lightest <= ratio + 1e-4).all()


def test_a_cap_on_recovery_holds_over_several_segments():
    """The heads that need more tokens for their share get the cap's best ones of all segments, the others their share."""
    pieces, q, cap = [segment_of(700, seed) for seed in (1, 2)], queries(), 40
    pieces = [Piece(segment, 700) for segment in pieces]
    none = torch.full((HEADS, GROUP), float("-inf"))
    found, shares = (
        [dense(hits, 700) for hits in _search(q, pieces, Plan(query, Flat(), NoResidual(), ""), none, SCALING, none)]
        for query in (Recovery(0.9, cap=cap), Recovery(0.9))
    )
    kept, share = torch.cat(found, -1), torch.cat(shares, -1)
    scores = torch.cat([exact(piece.segment, q, 700) for piece in pieces], -1)
    scores = scores.masked_fill(~share, float("-inf"))
    assert torch.equal(kept, share & (scores >= scores.topk(cap).values[..., -1:]))
    assert (share.sum(-1) > cap).any()


@pytest.mark.parametrize("block", [16, 50])
def test_quest_bound_is_an_upper_bound(block):
    segment, q = segment_of(203), queries()
    searcher = segment.searcher(Coarse(block=block, strategy="bounds"))
    blocks = -(-203 // block)
    bound = searcher._scores(q, blocks)
    scores = torch.nn.functional.pad(exact(segment, q, 203), (0, blocks * block - 203), value=-1e9)
    assert (bound + 1e-3 >= scores.unflatten(-1, (blocks, block)).amax(-1)).all()


def test_a_cap_on_coarse_counts_tokens():
    segment, q, index = segment_of(200), queries(), Coarse(block=16, strategy="mean")
    capped, best = (search(segment, index, query, q) for query in (DIPR(beta=float("inf"), cap=40), TopK(40)))
    assert torch.equal(dense(capped, 200), dense(best, 200)) and bool((dense(best, 200).sum(-1) <= 48).all())


@pytest.mark.parametrize("strategy", ["bounds", "mean", "representatives"])
def test_coarse_returns_whole_blocks_and_grows(strategy):
    index = Coarse(block=16, strategy=strategy, count=2)
    segment, q = segment_of(100), queries()
    hits = dense(search(segment, index, TopK(32), q), 100)
    assert set(hits.sum(-1).flatten().tolist()) <= {32, 20}  # two blocks, one of them perhaps the last with 4 tokens
    segment.append(torch.randn(HEADS, 60, DIM), torch.randn(HEADS, 60, DIM))
    grown = dense(search(segment, index, TopK(32), q), 160)
    fresh = Segment(HEADS, DIM, torch.float32)
    fresh.append(segment.kv[:, :, 0], segment.kv[:, :, 1])
    if strategy != "representatives":  # whose choice depends on the sampled queries
        assert torch.equal(grown, dense(search(fresh, index, TopK(32), q), 160))
    assert (grown.sum(-1) == 32).all()


INDEXES = [
    Flat(),
    Quantized(),
    Quantized(8, margin=0),
    Sign(),
    Coarse(block=8),
    Coarse(block=8, strategy="bounds"),
    Graph(degree=8),
]


@pytest.mark.parametrize("index", INDEXES, ids=str)
class TestEveryIndex:
    def test_prefix(self, index):
        """Nothing beyond the prefix, and within it what a search of the prefix alone would find, or close to it."""
        segment, q = segment_of(800), queries()
        hits = dense(search(segment, index, TopK(32), q, tokens=300), 300)
        truth = dense(search(segment, Flat(), TopK(32), q, tokens=300), 300)
        assert hits.any(-1).all()
        if not isinstance(index, Coarse):
            assert (hits & truth).sum() / truth.sum() >= 0.9

    def test_one_token(self, index):
        segment = segment_of(1)
        assert dense(search(segment, index, DIPR(), queries()), 1).all()

    def test_duplicated_keys(self, index):
        segment = Segment(HEADS, DIM, torch.float32)
        segment.append(torch.ones(HEADS, 90, DIM), torch.ones(HEADS, 90, DIM))
        assert dense(search(segment, index, DIPR(), queries()), 90).all()

    def test_extend_keeps_recall(self, index):
        segment, q = segment_of(500), queries()
        search(segment, index, TopK(16), q)
        more = segment_of(300, seed=5)
        segment.append(more.kv[:, :, 0], more.kv[:, :, 1])
        truth = dense(search(segment, Flat(), TopK(16), q), 800)
        if not isinstance(index, Coarse):
            assert (dense(search(segment, index, TopK(16), q), 800) & truth).sum() / truth.sum() >= 0.9


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_vectors_that_are_not_finite_are_refused(value):
    segment = segment_of(10)
    keys = torch.zeros(HEADS, 2, DIM)
    keys[1, 0, 3] = value
    with pytest.raises(NonFiniteError, match="finite"):
        segment.append(keys, torch.zeros(HEADS, 2, DIM))
    assert segment.used == 10


@given(st.sampled_from(["graph", "coarse"]), st.floats(0.1, 0.9))
@settings(max_examples=5, deadline=None)
def test_recovery_needs_every_score(index, ratio):
    with pytest.raises(ConfigError, match=index):
        AlayaConfig(query=Recovery(ratio), index=index, residual="block_means")


def test_sign_scores_match_their_reference_and_their_error():
    from alaya_hf.kernels.cpu.sign import SignKeys, sign_scores, sign_scores_reference

    # Independent keys and many queries: clusters would share their errors.
    generator = torch.Generator().manual_seed(2)
    keys = torch.randn(HEADS, 3000, DIM, generator=generator) + 1
    q = torch.randn(HEADS, 50, DIM, generator=generator)
    signs = SignKeys(HEADS, DIM)
    for part in keys.split(1100, dim=1):
        signs.append(part)
    found = sign_scores(q, signs)
    assert torch.allclose(found, sign_scores_reference(q, signs), atol=1e-3)
    error = (found - q @ keys.transpose(1, 2)) / (q.norm(dim=-1, keepdim=True) * signs.spread[:, None, :3000])
    # Unbiased, and as spread out as claimed.
    assert error.mean().abs() < 0.05 and 0.9 < error.std() < 1.1
