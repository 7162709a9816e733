"""Residuals: what the query leaves out, against attention to exactly those tokens."""

from __future__ import annotations

import pytest
import torch

from alaya_hf import BlockMean, Flat, LowBit, NoResidual, Quantized, TopK
from alaya_hf.errors import ConfigError
from alaya_hf.index import Hits
from alaya_hf.kernels import host
from alaya_hf.kernels.partial import merge
from alaya_hf.storage import Piece, Segment

HEADS, GROUP, DIM, TOKENS = 2, 3, 32, 400
SCALING = DIM**-0.5


@pytest.fixture
def piece() -> Piece:
    torch.manual_seed(0)
    segment = Segment(HEADS, DIM, torch.float32)
    segment.append(torch.randn(HEADS, TOKENS, DIM), torch.randn(HEADS, TOKENS, DIM))
    return Piece(segment, TOKENS)


def hits_of(ids: torch.Tensor, scores: torch.Tensor | None, mask: torch.Tensor | None = None) -> Hits:
    ids = ids.to(torch.int32)
    offsets = torch.tensor([0, len(ids), 2 * len(ids)])
    mask = torch.ones(GROUP, 2 * len(ids), dtype=torch.uint8) if mask is None else mask
    return Hits(torch.cat([ids, ids]), offsets, mask, all_scores=scores)


def truth(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    logits = (q.double() @ keys.double().transpose(1, 2) * SCALING).masked_fill(~seen, -torch.inf)
    return logits.softmax(-1) @ values.double(), logits.logsumexp(-1)


ALL = torch.arange(TOKENS)


@pytest.mark.parametrize("residual", [NoResidual(), LowBit(), LowBit(4, 4), BlockMean(), BlockMean(16, True)], ids=str)
def test_nothing_left_out_is_an_empty_partial(piece, residual):
    q = torch.randn(HEADS, GROUP, DIM)
    residual.prepare(piece.segment)
    part = residual.estimate(q, piece, hits_of(ALL, host.scan_scores(q, piece.kv)), None, SCALING)
    assert torch.isneginf(part.lse).all() and not part.out.any()


@pytest.mark.parametrize("keys", ["auto", True])
@pytest.mark.parametrize("kept", [[], [0, 3, 17, 399]], ids=str)
def test_blocks_of_one_token_are_exact(piece, keys, kept):
    """With exact scores (or exact keys) and one token a block, retrieved + residual is full attention."""
    q, kept = torch.randn(HEADS, GROUP, DIM), torch.tensor(kept, dtype=torch.long)
    hits = hits_of(kept, host.scan_scores(q, piece.kv))
    part = BlockMean(1, keys).estimate(q, piece, hits, None, SCALING)
    retrieved = host.gather_attention(q, piece.kv, hits.ids, hits.offsets, SCALING)
    out, lse = truth(q, piece.kv[:, :, 0], piece.kv[:, :, 1], torch.ones(HEADS, GROUP, TOKENS, dtype=torch.bool))
    whole = merge([part, retrieved])
    # Means are kept in float16.
    assert (whole.out - out).abs().max() < 2e-3 and (whole.lse - lse).abs().max() < 2e-3


@pytest.mark.parametrize("length", [TOKENS, 150])
@pytest.mark.parametrize("own", [False, True], ids=["union", "per_head"])
def test_low_bit_attends_to_what_is_left(piece, length, own):
    """Equals attention to the dequantized keys and values of the tokens left out, prefix and masks respected."""
    q = torch.randn(HEADS, GROUP, DIM)
    residual = LowBit(8, 4, skip=0)
    residual.prepare(piece.segment)
    part = Piece(piece.segment, length)
    kept = torch.tensor([1, 64, 100, 149])
    mask = torch.randint(2, (GROUP, 8), dtype=torch.uint8) if own else None
    hits = hits_of(kept, None, mask)
    found = residual.estimate(q, part, hits, mask, SCALING)
    keys, values = piece.segment.lowbit(8, 4).dequantize()
    left = torch.ones(HEADS, GROUP, TOKENS, dtype=torch.bool)
    left[:, :, length:] = False
    for head in range(HEADS):
        for g in range(GROUP):
            taken = kept if mask is None else kept[mask[g, 4 * head : 4 * head + 4].bool()]
            left[head, g, taken] = False
    out, lse = truth(q, keys, values, left)
    assert (found.out - out).abs().max() < 5e-3 and (found.lse - lse).abs().max() < 5e-3


def test_index_and_residual_share_one_copy(piece):
    LowBit(4, 2).prepare(piece.segment)
    inf = torch.full((HEADS, GROUP), -torch.inf)
    q = torch.randn(HEADS, GROUP, DIM)
    piece.segment.searcher(Quantized(4)).search(q, piece.kv, TopK(4), inf, SCALING, inf)
    assert list(piece.segment._lowbits) == [(4, 2)]


def test_two_precisions_beat_retrieval_alone(piece):
    q = torch.randn(HEADS, GROUP, DIM)
    inf = torch.full((HEADS, GROUP), -torch.inf)
    hits = piece.segment.searcher(Flat()).search(q, piece.kv, TopK(8), inf, SCALING, inf)
    retrieved = host.gather_attention(q, piece.kv, hits.ids, hits.offsets, SCALING)
    out, _ = truth(q, piece.kv[:, :, 0], piece.kv[:, :, 1], torch.ones(HEADS, GROUP, TOKENS, dtype=torch.bool))
    alone = (retrieved.out - out).norm()
    for residual, factor in ((LowBit(4, 4), 8), (LowBit(4, 2), 3), (BlockMean(8), 1.2)):
        residual.prepare(piece.segment)
        scores = host.scan_scores(q, piece.kv)
        hits.all_scores = scores
        both = merge([retrieved, residual.estimate(q, piece, hits, None, SCALING)])
        assert (both.out - out).norm() * factor < alone


def test_means_without_keys_need_scores():
    from alaya_hf import AlayaConfig

    with pytest.raises(ConfigError, match="graph"):
        AlayaConfig(index="graph", residual={"kind": "block_means", "keys": False})
