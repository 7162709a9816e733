"""Bootstrap intervals over items, resampled by document, and what they say."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

RESAMPLES, CONFIDENCE, SEED = 10_000, 0.95, 0


@dataclass(frozen=True)
class Estimate:
    """A mean and its confidence interval.

    Parameters
    ----------
    mean, low, high : float
        ``low`` and ``high`` are NaN where there is no interval: a single document cannot say how documents differ.
    items, documents : int
    """

    mean: float
    low: float
    high: float
    items: int
    documents: int

    @property
    def has_interval(self) -> bool:
        """Whether there is an interval."""
        return not math.isnan(self.low)


@lru_cache(maxsize=64)
def _draws(documents: int, resamples: int, seed: int) -> np.ndarray[Any, Any]:
    """How often each resample holds each document, ``[resamples, documents]``."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(documents, np.full(documents, 1 / documents), size=resamples).astype(np.float64)


def estimate(
    values: Sequence[float],
    documents: Sequence[str],
    weights: Sequence[float] | None = None,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
    seed: int = SEED,
) -> Estimate:
    """Weighted mean with a percentile bootstrap interval that resamples whole documents.

    Items of one document share its text, so they are not independent; documents are (cluster bootstrap: Davison and Hinkley,
    Bootstrap Methods and their Application, 1997, section 3.8).

    Parameters
    ----------
    values : sequence of float
        One per item.
    documents : sequence of str
        The document of each item.
    weights : sequence of float, optional
        Of the items, positive; equal by default.
    resamples : int
    confidence : float
    seed : int

    Returns
    -------
    Estimate

    Raises
    ------
    ValueError
        If there are no values, or the sequences differ in length.

    Notes
    -----
    ``O(resamples * documents)``. With fewer than about ten documents such intervals are too narrow.
    """
    if not len(values):
        raise ValueError("no values to take a mean of: expected at least one item.")
    weights = [1.0] * len(values) if weights is None else weights
    if not len(values) == len(documents) == len(weights):
        raise ValueError(
            f"{len(values)} values, {len(documents)} documents, {len(weights)} weights: expected one of each for every item."
        )
    numbers = {name: place for place, name in enumerate(dict.fromkeys(documents))}
    member = np.array([numbers[name] for name in documents])
    weight = np.asarray(weights, dtype=np.float64)
    sums = np.bincount(member, weight * np.asarray(values, dtype=np.float64), len(numbers))
    totals = np.bincount(member, weight, len(numbers))
    mean, low, high = float(sums.sum() / totals.sum()), math.nan, math.nan
    if len(numbers) > 1:
        draws = _draws(len(numbers), resamples, seed)
        means = (draws @ sums) / (draws @ totals)
        tail = (1 - confidence) / 2
        low, high = (float(bound) for bound in np.quantile(means, [tail, 1 - tail]))
    return Estimate(mean, low, high, len(values), len(numbers))


def mark(difference: Estimate, higher_is_better: bool, tolerance: float) -> str:
    """``"="``, ``"+"`` (better), ``"-"`` (worse), or ``"?"`` where a single document leaves it open.

    Equal means within ``tolerance``, or an interval that holds 0.
    """
    # A difference of exactly the tolerance is within it, whatever the rounding.
    if abs(difference.mean) <= tolerance + 1e-9:
        return "="
    if not difference.has_interval:
        return "?"
    if difference.low <= 0 <= difference.high:
        return "="
    return "+" if (difference.mean > 0) == higher_is_better else "-"


def significant(difference: Estimate) -> bool:
    """Whether the interval lies on one side of 0."""
    return difference.has_interval and not difference.low <= 0 <= difference.high
