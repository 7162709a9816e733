"""Measurements of what a cache did. Off by default and free when off."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class StepRecord:
    """What one layer did in one forward pass.

    Attributes
    ----------
    kind : str
        ``"prefill"`` or ``"decode"``.
    tokens : int
        New tokens of the pass.
    context : float
        Tokens each query could see, mean over rows.
    attended : float
        Tokens attended exactly per query head (window and retrieved), mean over rows and heads.
    retrieved : float
        Offloaded tokens that a query head's own query asked for, mean over rows and heads.
    fetched : float
        Offloaded tokens read per KV head, mean over rows and KV heads: the union over the group.
    touched : float
        Offloaded keys scored per KV head, mean over rows.
    recovery : float or None
        Mean share of the attention mass on the exactly attended tokens, in [0, 1]; None if not asked for.
    min_recovery : float or None
        The same of the worst head.
    watched : float or None
        Share of the probe's watched tokens that were attended exactly, mean over rows, query heads and positions.
    watched_coverage : float or None
        Share of them that at least one query head attended to exactly, mean over rows and positions.
    bytes_moved : int
        Bytes of keys and values that crossed between store and attention, both ways.
    seconds : float
        Wall time of the attention of this layer, host side.
    tiles, skipped_tiles : int
        Of a prefill that skips tiles: those off the diagonal, over heads and rows, and how many of them were skipped.
    error : float or None
        Estimated error of the output relative to its norm, mean over rows and heads, see :mod:`alaya_hf.engine.error`; None
        where nothing is known.
    widened : bool
        Whether the step was doubtful and attended again with a wider cut.
    """

    kind: str
    tokens: int
    context: float
    attended: float
    retrieved: float
    fetched: float
    touched: float
    recovery: float | None
    min_recovery: float | None
    watched: float | None
    watched_coverage: float | None
    bytes_moved: int
    seconds: float
    tiles: int = 0
    skipped_tiles: int = 0
    error: float | None = None
    widened: bool = False


@dataclass
class Monitor:
    """What the last decode steps of one layer took: what a planner corrects its estimates by.

    Parameters
    ----------
    want_error : bool
        Also estimate the error of every step.
    length : int
        Steps kept.

    Attributes
    ----------
    seconds, retrieved, fetched, errors : deque of float
        Of the last steps of one token, see :class:`StepRecord`.
    steps, doubtful, widened : int
        All that were seen; those whose estimated error was too large; those attended again.
    """

    want_error: bool = False
    length: int = 32
    steps: int = 0
    doubtful: int = 0
    widened: int = 0

    def __post_init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget the steps kept: the plan has changed."""
        self.seconds: deque[float] = deque(maxlen=self.length)
        self.retrieved: deque[float] = deque(maxlen=self.length)
        self.fetched: deque[float] = deque(maxlen=self.length)
        self.errors: deque[float] = deque(maxlen=self.length)


@dataclass
class Probe:
    """Collects the records of one layer.

    Parameters
    ----------
    recovery : bool
        Also compute the recovery ratio, which costs a dense pass over the offloaded keys in every step.
    observer : callable, optional
        Called in every decode step with the layer, the queries ``[batch, heads, q_len, head_dim]``, and the best score and
        log-sum-exp of the window (``[batch, heads, q_len]``), before anything is retrieved.
    watch : Tensor, optional
        ``[n]`` int64 on the host, token positions in ascending order: how far the attended tokens cover them is recorded in
        every decode step. With the tokens of the passage that holds an answer this is *evidence recall*.
    """

    recovery: bool = False
    observer: Callable[[Any, Tensor, Tensor, Tensor], None] | None = None
    watch: Tensor | None = None
    steps: list[StepRecord] = field(default_factory=list)
    ids: list[Tensor] = field(default_factory=list)
    head_counts: list[Tensor] = field(default_factory=list)

    def histogram(self, bins: int, length: int) -> Tensor:
        """How often each part of the context was fetched: ``[bins]`` int64 counts over token positions."""
        if not self.ids:
            return torch.zeros(bins, dtype=torch.int64)
        ids = torch.cat(self.ids).long()
        return torch.bincount((ids * bins // max(1, length)).clamp(max=bins - 1), minlength=bins)

    def summary(self) -> dict[str, Any]:
        """Means over the decode steps."""
        decode = [step for step in self.steps if step.kind == "decode"]
        summary: dict[str, Any] = {"steps": len(decode)}
        for name in (
            "context",
            "attended",
            "retrieved",
            "fetched",
            "touched",
            "recovery",
            "watched",
            "watched_coverage",
            "seconds",
            "error",
        ):
            values = [getattr(step, name) for step in decode if getattr(step, name) is not None]
            summary[name] = sum(values) / len(values) if values else None
        worst = [step.min_recovery for step in decode if step.min_recovery is not None]
        summary["min_recovery"] = min(worst) if worst else None
        tiles = sum(step.tiles for step in self.steps)
        summary["skipped_tiles"] = sum(step.skipped_tiles for step in self.steps) / tiles if tiles else None
        summary["bytes_moved"] = sum(step.bytes_moved for step in self.steps)
        if self.head_counts:
            summary["retrieved_per_head"] = torch.stack(self.head_counts).double().mean(dim=0).tolist()
        return summary

    def records(self) -> list[dict[str, object]]:
        """Every step as plain data."""
        return [dataclasses.asdict(step) for step in self.steps]
