"""Moving a sequence between two pools in as few copies as their layouts allow."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from alaya_hf.errors import AlayaError
from alaya_hf.storage.allocators.base import Extents, KVPool


class Copies(NamedTuple):
    """Runs of bytes to copy.

    Attributes
    ----------
    source, target, size : ndarray
        ``[n]`` int64, byte offsets in the two arenas and bytes.
    """

    source: np.ndarray
    target: np.ndarray
    size: np.ndarray


@dataclass(frozen=True)
class TransferReport:
    """What a transfer took.

    Attributes
    ----------
    calls : int
        Copies issued.
    bytes : int
        Bytes copied; more than the sequence's where whole blocks go, unfilled ends included.
    seconds : float
        From the plan to the last byte, devices waited for. 0 if the pools only keep accounts.
    """

    calls: int
    bytes: int
    seconds: float


def plan(source: Extents, target: Extents, row_bytes: int, join: bool = True) -> Copies:
    """The copies that bring one sequence from one layout to another: maximal runs contiguous on both sides.

    Parameters
    ----------
    source, target : Extents
        Of the same number of tokens and layers.
    row_bytes : int
        Bytes of a token in one layer.
    join : bool
        False leaves one copy per layer and block, the way of systems that copy block by block.

    Notes
    -----
    FlowKV (arXiv 2504.03775, section 3). Runs may cross layers and blocks. Where both sides have whole blocks the unfilled end
    of the last one goes along, which keeps its layers in one run. ``O(n log n)`` in blocks times layers.
    """
    end = min(int(source.starts[-1]), int(target.starts[-1]))
    cuts = np.union1d(source.starts, target.starts)
    cuts = cuts[cuts <= end]
    begins, tokens = cuts[:-1], np.diff(cuts)

    def offsets(side: Extents) -> np.ndarray:
        piece = np.searchsorted(side.starts, begins, side="right") - 1
        return (side.offsets[:, piece] + (begins - side.starts[piece]) * row_bytes).ravel()

    sizes = np.tile(tokens * row_bytes, len(source.offsets))
    froms, tos = offsets(source), offsets(target)
    if not join or not len(sizes):
        return Copies(froms, tos, sizes)
    order = np.argsort(froms, kind="stable")
    froms, tos, sizes = froms[order], tos[order], sizes[order]
    follows = (froms[1:] == froms[:-1] + sizes[:-1]) & (tos[1:] == tos[:-1] + sizes[:-1])
    first = np.flatnonzero(np.r_[True, ~follows])
    return Copies(froms[first], tos[first], np.add.reduceat(sizes, first))


def transfer(source: KVPool, sequence: int, target: KVPool, join: bool = True) -> tuple[int, TransferReport]:
    """Copy a sequence into another pool, on any device; the sequence stays where it is.

    Parameters
    ----------
    source : KVPool
    sequence : int
        Its number in ``source``.
    target : KVPool
        Of the same shape; any allocator.
    join : bool
        See :func:`plan`.

    Returns
    -------
    int, TransferReport
        Its number in ``target``.

    Raises
    ------
    AlayaError
        If the shapes differ, or one pool has memory and the other only keeps accounts.
    PoolFullError
        If ``target`` has no room; it is as it was then.
    UnknownSequenceError
    """
    if source.shape != target.shape:
        raise AlayaError(f"cannot transfer from {source.shape} to {target.shape}: open both pools with the same shape")
    if source.has_memory != target.has_memory:
        raise AlayaError(
            "cannot transfer between a pool with memory and one that only keeps accounts. Open both alike."
        )
    copy = target.allocate(source.length(sequence))
    try:
        began = time.perf_counter()
        copies = plan(source.transfer_runs(sequence), target.transfer_runs(copy), source.shape.row_bytes, join)
        seconds = 0.0
        if source.has_memory:
            _run(source, target, copies)
            seconds = time.perf_counter() - began
    except BaseException:
        target.free(copy)
        raise
    return copy, TransferReport(len(copies.size), int(copies.size.sum()), seconds)


def _run(source: KVPool, target: KVPool, copies: Copies) -> None:
    devices = set()
    for begin, end, size in zip(*(part.tolist() for part in copies), strict=True):
        data, place = source.arena.view(begin, size), target.arena.view(end, size)
        place.copy_(data, non_blocking=True)
        devices |= {x.device for x in (data, place) if x.is_cuda}
    for device in devices:
        torch.cuda.synchronize(device)
