"""CPU kernels against their plain torch references in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from alaya_hf.kernels.cpu import (
    BlockMeans,
    LowBitKV,
    block_mean_attention,
    block_mean_attention_reference,
    dense_attention,
    dense_attention_reference,
    gather_attention,
    gather_attention_reference,
    gather_scores,
    gather_scores_reference,
    kth_largest,
    kth_largest_reference,
    lowbit_attention,
    lowbit_attention_reference,
    lowbit_scores,
    lowbit_scores_reference,
    recovery_threshold,
    recovery_threshold_reference,
    row_max,
    scan_scores,
    scan_scores_reference,
    select_threshold,
    select_threshold_reference,
)
from alaya_hf.kernels.partial import Partial, merge

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# heads, group, head_dim, tokens: every remainder of the group by 4, of the tokens by 64 and of head_dim by 16
SHAPES = [(2, 4, 128, 1300), (3, 3, 80, 65), (1, 9, 96, 64), (2, 1, 64, 63), (2, 6, 24, 1), (2, 2, 8, 0)]


def make_context(heads: int, group: int, d: int, n: int, dtype: torch.dtype = torch.float32, seed: int = 0):
    """Keys of low rank with channel offsets, a few keys that stand out, and queries that look for them.

    The store is a view of the first tokens of a larger buffer whose rest is nan: reading past the end would show.
    """
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=rng)

    keys = normal(heads, n, 5) @ normal(heads, 5, d) * 0.5 + normal(heads, 1, d) * 2 + normal(heads, n, d) * 0.3
    values = normal(heads, n, 5) @ normal(heads, 5, d) * 0.5 + normal(heads, n, d) * 0.5
    q = normal(heads, group, d) * 0.3
    if n:
        needles = torch.randint(0, n, (heads, group), generator=rng)
        found = keys.gather(1, needles.unsqueeze(-1).expand(-1, -1, d)) - keys.mean(1, keepdim=True)
        q = q + found * (8 * d**0.5 / found.square().sum(-1, keepdim=True).clamp_min(1.0))
    buffer = torch.full((heads, n + 70, 2, d), float("nan"), dtype=dtype)
    kv = buffer[:, :n]
    kv.copy_(torch.stack([keys, values], dim=2))
    return q.float(), kv


def assert_partial(actual: Partial, expected: Partial, tolerance: float = 1e-5) -> None:
    assert actual.out.dtype == actual.lse.dtype == torch.float32
    torch.testing.assert_close(actual.lse.double(), expected.lse.double(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(actual.out.double(), expected.out.double(), rtol=tolerance, atol=tolerance)


def make_selection(heads: int, group: int, n: int, seed: int = 0):
    """Ascending ids per head (the last head without any), and a mask that hides some from some query heads."""
    rng = torch.Generator().manual_seed(seed)
    lists = [torch.randperm(n, generator=rng)[: n // 3].sort().values for _ in range(heads - 1)]
    lists.append(torch.empty(0, dtype=torch.int64))
    offsets = torch.tensor([0] + [len(x) for x in lists]).cumsum(0)
    mask = (torch.rand(group, int(offsets[-1]), generator=rng) < 0.6).to(torch.uint8)
    mask[0] = 0  # a query head that sees nothing
    return torch.cat(lists).int(), offsets, mask


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dense_attention_and_scan_match_float64(shape, dtype):
    q, kv = make_context(*shape, dtype)
    scaling = shape[2] ** -0.5
    assert_partial(dense_attention(q, kv, scaling), dense_attention_reference(q.double(), kv, scaling))
    torch.testing.assert_close(scan_scores(q, kv).double(), scan_scores_reference(q.double(), kv), rtol=1e-5, atol=1e-4)


def test_dense_attention_of_ranges_merges_to_the_whole():
    q, kv = make_context(2, 4, 128, 1300)
    whole = dense_attention_reference(q.double(), kv, 0.1)
    parts = [dense_attention(q, kv, 0.1, a, b) for a, b in ((0, 0), (0, 64), (64, 65), (65, 1299), (1299, None))]
    assert_partial(merge(parts), whole)
    expected = scan_scores_reference(q.double(), kv)[:, :, 65:1299]
    torch.testing.assert_close(scan_scores(q, kv, 65, 1299).double(), expected, rtol=1e-5, atol=1e-4)
    with pytest.raises(ValueError, match="start <= stop"):
        dense_attention(q, kv, 0.1, 5, 1301)


def test_large_logits_do_not_overflow():
    q, kv = make_context(2, 4, 128, 300)
    assert_partial(dense_attention(q * 300, kv, 1.0), dense_attention_reference(q.double() * 300, kv, 1.0), 1e-3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_gather_attention_matches_float64(dtype, masked):
    q, kv = make_context(3, 6, 80, 700, dtype)
    ids, offsets, mask = make_selection(3, 6, 700)
    arguments = (kv, ids, offsets, 0.1, mask if masked else None)
    assert_partial(gather_attention(q, *arguments), gather_attention_reference(q.double(), *arguments))


def test_gather_scores_match_float64_and_foreign_ids_are_refused():
    q, kv = make_context(3, 4, 64, 700)
    ids, offsets, _ = make_selection(3, 4, 700)
    expected = gather_scores_reference(q.double(), kv, ids, offsets)
    torch.testing.assert_close(gather_scores(q, kv, ids, offsets).double(), expected, rtol=1e-5, atol=1e-4)
    ids[3] = 700
    with pytest.raises(ValueError, match=r"within \[0, 700\)"):
        gather_scores(q, kv, ids, offsets)


def test_stores_that_cannot_be_read_in_place_are_refused():
    q, kv = make_context(2, 4, 64, 10)
    with pytest.raises(ValueError, match="side by side"):
        dense_attention(q, kv.transpose(1, 3).contiguous().transpose(1, 3), 1.0)
    with pytest.raises(ValueError, match="float32 queries"):
        dense_attention(q.double(), kv, 1.0)


# ------------------------------------------------------------------------------------------------------------ low bit
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    d=st.sampled_from([16, 48, 64, 80, 128]),
    cuts=st.lists(st.integers(0, 150), min_size=1, max_size=4),
    key_bits=st.sampled_from([2, 4, 8]),
    value_bits=st.sampled_from([2, 4]),
    magnitude=st.sampled_from([1e-6, 1.0, 3e3]),
    offset=st.sampled_from([0.0, 10.0, -1e3]),
    constant=st.booleans(),
    seed=st.integers(0, 99),
)
def test_quantisation_error_is_at_most_half_a_step(d, cuts, key_bits, value_bits, magnitude, offset, constant, seed):
    _, kv = make_context(2, 1, d, sum(cuts), seed=seed)
    kv.mul_(0.0 if constant else magnitude).add_(offset)
    low = LowBitKV(2, d, key_bits, value_bits)
    at = 0
    for cut in cuts:
        low.append(kv[:, at : at + cut])
        at += cut
    keys, values = low.dequantize()
    assert keys.shape == values.shape == (2, at, d)
    full = at // 64 * 64
    groups = low.full_groups
    key_step = low.key_scale[:, :groups].float().repeat_interleave(64, dim=1)
    value_step = low.value_params[:, :at, :, 0].float().repeat_interleave(32, dim=2)[:, :, :d]
    slack = 1e-6 * (kv.abs().max().item() if at else 0.0) + 1e-12  # float32 arithmetic
    assert ((keys[:, :full] - kv[:, :full, 0]).abs() <= key_step * 0.5001 + slack).all()
    assert torch.equal(keys[:, full:], kv[:, full:, 0])  # the tail waits unquantised
    assert ((values - kv[:, :, 1]).abs() <= value_step * 0.5001 + slack).all()
    # A step is no wider than the range asks for: a bound that grew without need would pass the test above.
    spread = kv[:, :full, 0].reshape(2, groups, 64, d)
    needed = (spread.amax(2) - spread.amin(2)) / (2**key_bits - 1) if groups else torch.zeros(2, 0, d)
    float16_slack = 2e-3 * (kv.abs().max().item() if at else 0.0) / (2**key_bits - 1) + 1e-7
    assert (low.key_scale[:, :groups].float() <= needed * 1.002 + float16_slack).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_copies_of_16_bit_stores_equal_those_of_their_float32_values(dtype):
    _, kv = make_context(2, 1, 64, 200, dtype)
    one, other = LowBitKV(2, 64, 4, 2), LowBitKV(2, 64, 4, 2)
    one.append(kv)
    other.append(kv.float())
    for a, b in zip(one.dequantize(), other.dequantize(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("key_bits", [2, 4, 8])
@pytest.mark.parametrize("shape", [(2, 4, 128, 1300), (3, 7, 80, 65), (1, 3, 16, 64), (2, 1, 64, 63), (1, 2, 64, 0)])
def test_lowbit_scores_add_little_to_the_quantisation_error(shape, key_bits):
    heads, group, d, n = shape
    q, kv = make_context(*shape)
    low = LowBitKV(heads, d, key_bits, None)
    low.append(kv)
    scores = lowbit_scores(q, low).double()
    assert scores.shape == (heads, group, n)
    # The bound of rounding the query: half an integer step per channel, against a code off the middle by at most half.
    expected = lowbit_scores_reference(q.double(), low)
    if low.full_groups:
        step = (q.unsqueeze(2) * low.key_scale[:, None, : low.full_groups].float()).abs()
        levels, integers = 2**key_bits - 1, 127 if key_bits < 8 else 127 * 128
        bound = step.amax(-1) / integers * 0.5 * levels * 0.5 * d
        full = low.full_groups * 64
        error = (scores - expected)[:, :, :full].abs()
        assert (error <= bound.double().repeat_interleave(64, dim=-1) * 1.01 + 1e-4).all()
        exact = scan_scores_reference(q.double(), kv)[:, :, :full]
        own = (expected[:, :, :full] - exact).square().mean().sqrt()
        assert error.square().mean().sqrt() <= 0.42 * own + 1e-5
    torch.testing.assert_close(
        scores[:, :, low.full_groups * 64 :], expected[:, :, low.full_groups * 64 :], rtol=1e-5, atol=1e-4
    )


@pytest.mark.parametrize("value_bits", [2, 4])
@pytest.mark.parametrize("shape", [(2, 4, 128, 1300), (3, 7, 80, 65), (1, 3, 48, 64), (2, 1, 64, 1), (1, 2, 64, 0)])
def test_lowbit_attention_matches_softmax_over_the_dequantised_copy(shape, value_bits):
    heads, group, d, n = shape
    q, kv = make_context(*shape)
    low = LowBitKV(heads, d, 4, value_bits)
    low.append(kv)
    scaling = d**-0.5
    keys, values = low.dequantize()
    scores = lowbit_scores_reference(q, low)
    everything = dense_attention_reference(q.double(), torch.stack([keys, values], dim=2), scaling)
    assert_partial(lowbit_attention(low, scores, scaling, skip=0.0), everything)
    if not n:
        return
    thresholds = kth_largest_reference(scores, max(1, n // 40))
    thresholds[0, 0] = float("-inf")  # this query head keeps nothing
    thresholds[-1, -1] = float("inf")
    left_out = (torch.rand(heads, n, generator=torch.Generator().manual_seed(1)) < 0.2).to(torch.uint8)
    for conditions in ((thresholds, None), (None, left_out), (thresholds, left_out)):
        actual = lowbit_attention(low, scores, scaling, *conditions, skip=0.0)
        assert_partial(actual, lowbit_attention_reference(low, scores.double(), scaling, *conditions))


def test_skipping_tiles_keeps_its_bound_and_does_skip():
    q, kv = make_context(2, 4, 64, 6400)
    low = LowBitKV(2, 64, 4, 2)
    low.append(kv)
    scores = lowbit_scores_reference(q * 3, low)
    expected = lowbit_attention_reference(low, scores.double(), 0.2)
    for skip in (1e-4, 1e-2):
        actual = lowbit_attention(low, scores, 0.2, skip=skip)
        torch.testing.assert_close(actual.lse.double(), expected.lse, rtol=1e-5, atol=1e-5)
        bound = 2 * skip * low.dequantize()[1].abs().max()
        assert ((actual.out - expected.out).abs() <= bound + 1e-5).all()
    assert not torch.allclose(actual.out.double(), expected.out, rtol=0, atol=1e-6)


def test_truncate_then_append_continues_the_copy():
    _, kv = make_context(2, 1, 64, 400)
    low, fresh = LowBitKV(2, 64, 8, 4), LowBitKV(2, 64, 8, 4)
    low.append(kv)
    low.truncate(192)
    fresh.append(kv[:, :192])
    assert low.nbytes == fresh.nbytes
    for a, b in zip(low.dequantize(), fresh.dequantize(), strict=True):
        assert torch.equal(a, b)
    low.truncate(100)  # inside a group: 36 keys stay as they were quantised
    before = low.dequantize()
    low.append(kv[:, 100:400])
    keys, values = low.dequantize()
    assert low.num_tokens == 400
    assert torch.equal(keys[:, :64], before[0][:, :64]) and torch.equal(values[:, :100], before[1])
    step = low.key_scale[:, 1:2].float()
    assert ((keys[:, 64:100] - before[0][:, 64:]).abs() <= step * 0.501 + 1e-5).all()
    with pytest.raises(ValueError, match="between 0 and 400"):
        low.truncate(401)


def test_nbytes_counts_codes_steps_and_tail():
    _, kv = make_context(2, 1, 128, 130)
    low = LowBitKV(2, 128, 4, 2)
    low.append(kv)
    keys = 2 * 128 * (64 // 2 + 4)  # two groups: half a byte per code, two float16 per channel
    values = 130 * (128 // 4 + 4 * 4)
    assert low.nbytes == 2 * (keys + values + 64 * 128 * 4)


# ---------------------------------------------------------------------------------------------------------- selection
@pytest.mark.parametrize("n", [0, 1, 63, 64, 65, 5000])
def test_selection_is_exact(n):
    q, kv = make_context(3, 4, 64, n)
    scores = scan_scores_reference(q, kv)
    if n > 5:
        scores[:, :, 5] = scores[:, :, 2]  # a tie
    assert torch.equal(row_max(scores), kth_largest_reference(scores, 1))
    for k in (1, 3, 64, 700):
        assert torch.equal(kth_largest(scores, k), kth_largest_reference(scores, k))
    thresholds = kth_largest_reference(scores, 3)
    thresholds[0] = float("inf")
    thresholds[-1, 0] = float("-inf")
    for actual, expected in zip(
        select_threshold(scores, thresholds), select_threshold_reference(scores, thresholds), strict=True
    ):
        assert actual.dtype == expected.dtype and torch.equal(actual, expected)


@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("window", [float("-inf"), -3.0, 5.0])
def test_recovery_threshold_reaches_the_ratio_with_the_fewest_tokens(ratio, window):
    q, kv = make_context(2, 4, 64, 3000)
    scores, scaling = scan_scores_reference(q, kv), 0.125
    extra = torch.logsumexp(scores * scaling, dim=-1) + window
    thresholds = recovery_threshold(scores, scaling, ratio, extra)
    logits = scores.double() * scaling
    whole = torch.logaddexp(torch.logsumexp(logits, dim=-1), extra.double())
    mass = torch.exp(logits - whole.unsqueeze(-1))
    kept = scores >= thresholds.unsqueeze(-1)
    recovered = (mass * kept).sum(-1) + torch.exp(extra.double() - whole)
    assert (recovered >= ratio - 1e-6).all()
    least = (mass.masked_fill(~kept, 2.0)).amin(-1)  # without its smallest token a selection falls short
    assert ((recovered - least < ratio + 1e-6) | ~kept.any(-1)).all() or ratio == 1.0
    reference = recovery_threshold_reference(scores, scaling, ratio, extra)
    counts, expected = kept.sum(-1), (scores >= reference.unsqueeze(-1)).sum(-1)
    assert ((counts - expected).abs() <= 1 + expected // 1000).all()


# -------------------------------------------------------------------------------------------------------- block means
@pytest.mark.parametrize("with_scores", [True, False])
@pytest.mark.parametrize("shape", [(2, 4, 64, 5001), (3, 3, 80, 64), (2, 6, 24, 1), (2, 2, 64, 0)])
def test_block_mean_attention_matches_float64(shape, with_scores):
    heads, group, d, n = shape
    q, kv = make_context(*shape)
    means = BlockMeans(heads, d, 16, with_keys=True)
    at = 0
    for size in (5, 40, 3, n):
        means.append(kv[:, at : at + size])
        at = min(n, at + size)
    assert means.num_tokens == n
    expected = [kv[:, i : i + 16, 1].mean(1) for i in range(0, n, 16)]
    for i, mean in enumerate(expected):
        torch.testing.assert_close(means.value_means[:, i].float(), mean, rtol=1e-3, atol=1e-3)
    scores = scan_scores_reference(q, kv) if with_scores else None
    ids, offsets, mask = make_selection(heads, group, n)
    for selection in ((), (kv, ids, offsets), (kv, ids, offsets, mask)):
        actual = block_mean_attention(q, means, d**-0.5, scores, *selection)
        assert_partial(actual, block_mean_attention_reference(q.double(), means, d**-0.5, scores, *selection), 3e-5)


def test_blocks_of_one_token_are_exact_attention_to_the_rest():
    q, kv = make_context(2, 4, 64, 300)
    means = BlockMeans(2, 64, 1, dtype=torch.float32)
    means.append(kv)
    ids, offsets, _ = make_selection(2, 4, 300)
    rest = block_mean_attention(q, means, 0.125, scan_scores_reference(q, kv), kv, ids, offsets)
    found = gather_attention(q, kv, ids, offsets, 0.125)
    assert_partial(merge([rest, found]), dense_attention_reference(q.double(), kv, 0.125))


def test_truncated_block_means_equal_fresh_ones():
    _, kv = make_context(2, 1, 64, 300)
    means, fresh = BlockMeans(2, 64, 32), BlockMeans(2, 64, 32)
    means.append(kv)
    means.truncate(100, kv)
    means.append(kv[:, 100:150])
    fresh.append(kv[:, :150])
    assert means.num_blocks == fresh.num_blocks == 5
    torch.testing.assert_close(means.value_means[:, :5], fresh.value_means[:, :5], rtol=1e-3, atol=1e-3)
