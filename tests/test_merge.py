"""The merge of partials: exact, independent of the order, and neutral for empty sets."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from alaya_hf.kernels.partial import Partial, merge, merge_into

SHAPE, DIM = (2, 3), 5


def _case(tokens: int, seed: int, scale: float) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(*SHAPE, tokens, generator=generator, dtype=torch.float64) * scale
    return logits, torch.randn(tokens, DIM, generator=generator, dtype=torch.float64)


def _partial(logits: Tensor, values: Tensor) -> Partial:
    """The partial of one subset, computed in float64 by softmax."""
    if logits.shape[-1] == 0:
        return Partial.empty(SHAPE, DIM)
    out, lse = logits.softmax(-1) @ values, logits.logsumexp(-1)
    gone = torch.isneginf(lse)
    return Partial(torch.where(gone[..., None], torch.zeros_like(out), out).float(), lse.float())


def _assert_close(actual: Partial, logits: Tensor, values: Tensor) -> None:
    expected = _partial(logits, values)
    assert actual.out.dtype == actual.lse.dtype == torch.float32
    # Rounding lse to float32 moves every weight by this relative amount.
    finite = expected.lse[~torch.isneginf(expected.lse)]
    slack = 4 * torch.finfo(torch.float32).eps * (1 + float(finite.abs().max() if len(finite) else 0.0))
    assert torch.equal(torch.isneginf(actual.lse), torch.isneginf(expected.lse))
    torch.testing.assert_close(actual.lse, expected.lse, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(actual.out, expected.out, rtol=0, atol=slack * 8 * (1 + float(values.abs().max())))


def _split(logits: Tensor, values: Tensor, cuts: list[int]) -> list[Partial]:
    edges = [0, *sorted(min(cut, logits.shape[-1]) for cut in cuts), logits.shape[-1]]
    return [_partial(logits[..., a:b], values[a:b]) for a, b in zip(edges, edges[1:], strict=False)]


cases = st.tuples(st.integers(1, 40), st.integers(0, 10_000), st.sampled_from([0.0, 0.1, 1.0, 30.0, 3000.0]))
splits = st.lists(st.integers(0, 40), max_size=5)


@given(cases, splits)
def test_any_split_equals_the_whole(case: tuple[int, int, float], cuts: list[int]) -> None:
    logits, values = _case(*case)
    _assert_close(merge(_split(logits, values, cuts)), logits, values)


@given(cases, splits)
def test_merging_in_place_one_after_the_other_is_the_same(case: tuple[int, int, float], cuts: list[int]) -> None:
    logits, values = _case(*case)
    total = Partial.empty(SHAPE, DIM)
    for part in _split(logits, values, cuts):
        assert merge_into(total, part) is total
    _assert_close(total, logits, values)


@given(cases, splits, st.randoms(use_true_random=False))
def test_order_does_not_matter(case: tuple[int, int, float], cuts: list[int], random: object) -> None:
    logits, values = _case(*case)
    parts = _split(logits, values, cuts)
    shuffled = list(parts)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    one, other = merge(parts), merge(shuffled)
    torch.testing.assert_close(one.lse, other.lse, rtol=1e-6, atol=1e-6)
    _assert_close(other, logits, values)


@given(cases, splits)
def test_merging_in_two_steps_is_merging_at_once(case: tuple[int, int, float], cuts: list[int]) -> None:
    logits, values = _case(*case)
    parts = _split(logits, values, cuts)
    half = (len(parts) + 1) // 2
    nested = merge([merge(parts[:half]), *([merge(parts[half:])] if parts[half:] else [])])
    _assert_close(nested, logits, values)


@given(cases, st.integers(0, 3), st.integers(0, 3))
def test_empty_sets_change_nothing(case: tuple[int, int, float], before: int, after: int) -> None:
    whole = _partial(*_case(*case))
    empty = Partial.empty(SHAPE, DIM)
    merged = merge([empty] * before + [whole] + [empty] * after)
    assert torch.equal(merged.out, whole.out) and torch.equal(merged.lse, whole.lse)


@given(st.integers(1, 4))
def test_only_empty_sets_stay_empty(count: int) -> None:
    merged = merge([Partial.empty(SHAPE, DIM)] * count)
    assert bool((merged.out == 0).all()) and bool(torch.isneginf(merged.lse).all())


@given(cases, splits, st.integers(0, 2**6 - 1))
def test_rows_that_see_nothing(case: tuple[int, int, float], cuts: list[int], rows: int) -> None:
    """A row whose logits are all -inf is empty; the other rows do not notice."""
    logits, values = _case(*case)
    gone = torch.tensor([bool(rows >> bit & 1) for bit in range(6)]).view(SHAPE)
    logits = logits.masked_fill(gone.unsqueeze(-1), float("-inf"))
    merged = merge(_split(logits, values, cuts))
    assert not bool(merged.out.isnan().any())
    assert torch.equal(torch.isneginf(merged.lse), gone)
    assert bool((merged.out[gone] == 0).all())
    kept = ~gone
    if kept.any():
        expected = logits.softmax(-1)[kept] @ values
        slack = 64 * torch.finfo(torch.float32).eps * (1 + float(logits[kept].abs().max()))
        torch.testing.assert_close(
            merged.out[kept].double(), expected, rtol=0, atol=slack * (1 + float(values.abs().max()))
        )


@given(st.sampled_from([1e4, 1e6, 1e30, -1e4, -1e30]), st.integers(0, 1000))
def test_large_logits_do_not_overflow(offset: float, seed: int) -> None:
    """exp(logit) of these is infinite or zero in any precision."""
    first, second = (_partial(*_case(8, seed + i, 1.0)) for i in range(2))
    shifted = merge([Partial(part.out, part.lse * 0 + offset) for part in (first, second)])
    torch.testing.assert_close(shifted.out, (first.out + second.out) / 2, rtol=1e-5, atol=1e-6)
    assert bool(shifted.lse.isfinite().all())
    # Far below the other set: no weight, and no nan.
    far = merge([first, Partial(second.out, first.lse - 1e6)])
    assert torch.equal(far.out, first.out) and torch.equal(far.lse, first.lse)


def test_nothing_to_merge() -> None:
    with pytest.raises(ValueError, match="at least one"):
        merge([])
