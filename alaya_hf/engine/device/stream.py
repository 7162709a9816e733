"""Offloaded blocks on their way to the device, one block ahead of who reads them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from alaya_hf.engine.device.store.base import copy_lines, token_major, zip_pieces


@lru_cache(maxsize=32)
def side_stream(device: torch.device, purpose: str) -> torch.cuda.Stream:
    """A device's stream for copies: ``"read"`` from host memory, ``"write"`` to it, which the bus carries both at once."""
    return torch.cuda.Stream(device)


@dataclass
class CopyWaits:
    """When a device's compute stream waited for copies: events before and behind every wait."""

    pairs: list[tuple[torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)

    def seconds(self) -> float:
        """All waits together. Waits for the device."""
        torch.cuda.synchronize()
        return sum(begin.elapsed_time(end) for begin, end in self.pairs) / 1e3


_waits: ContextVar[CopyWaits | None] = ContextVar("alaya_hf_copy_waits", default=None)


@contextmanager
def copy_waits() -> Iterator[CopyWaits]:
    """Measure the waits of what runs inside, on one device: two timed events each. Not around a captured step."""
    waits = CopyWaits()
    token = _waits.set(waits)
    try:
        yield waits
    finally:
        _waits.reset(token)


def wait_for_copy(stream: torch.cuda.Stream, copied: torch.cuda.Event) -> None:
    """Let what comes next on a compute stream wait for a copy."""
    waits = _waits.get()
    if waits is None:
        stream.wait_event(copied)
        return
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record(stream)
    stream.wait_event(copied)
    end.record(stream)
    waits.pairs.append((begin, end))


def _arranged(pieces: Sequence[Tensor], tokens: int, device: torch.device) -> Tensor:
    """``[kv_heads, tokens, ...]`` on the device, in the order of the pieces."""
    heads, _, _, *tail = pieces[0].shape
    if token_major(pieces[0]):
        return torch.empty(tokens, heads, *tail, dtype=pieces[0].dtype, device=device).transpose(0, 1)
    return torch.empty(heads, tokens, *tail, dtype=pieces[0].dtype, device=device)


def _length(pieces: Sequence[Tensor]) -> int:
    return sum(piece.shape[1] * piece.shape[2] for piece in pieces)


def _copy(target: Tensor, pieces: Sequence[Tensor]) -> None:
    for piece, part in zip_pieces(pieces, target):
        copy_lines(part, piece)


def stream_blocks(sources: Sequence[Sequence[Tensor]], device: torch.device) -> Iterator[Tensor]:
    """Bring blocks of host memory to a device, in order.

    On a GPU the first copy starts at once, and the copy of the next block runs on a stream of its own while the caller's work on
    this one runs on the current stream. The host waits for nothing.

    Parameters
    ----------
    sources : sequence of sequence of Tensor
        The pieces of every block in order, ``[kv_heads, parts, n, ...]`` each, one dtype and one order in memory, parts and
        ``n`` may differ. Pinned if the device is a GPU, and written, if at all, by what the current stream holds already.
    device : torch.device

    Returns
    -------
    iterator of Tensor ``[kv_heads, n, ...]`` on the device
        Each valid until the next one is asked for: for work on the current stream up to that call.

    Notes
    -----
    Holds two blocks on the device.
    """
    if device.type != "cuda" or not sources:
        joined = ([piece.flatten(1, 2) for piece in pieces] for pieces in sources)
        return ((lines[0] if len(lines) == 1 else torch.cat(lines, 1)).to(device) for lines in joined)
    size = max(map(_length, sources))
    main, side = torch.cuda.current_stream(device), side_stream(device, "read")
    buffers = [_arranged(sources[0], size, device) for _ in sources[:2]]
    for buffer in buffers:
        buffer.record_stream(side)  # whoever gives up half-way must not free what a copy still writes to
    arrived = [torch.cuda.Event() for _ in buffers]
    released = [torch.cuda.Event() for _ in buffers]
    # What the current stream still does with the buffers' memory, and what it still writes to the host, comes first.
    side.wait_stream(main)

    def fetch(i: int) -> None:
        with torch.cuda.stream(side):
            if i >= 2:
                side.wait_event(released[i % 2])
            _copy(buffers[i % 2], sources[i])
            arrived[i % 2].record(side)

    def blocks() -> Iterator[Tensor]:
        for i, pieces in enumerate(sources):
            if i + 1 < len(sources):
                fetch(i + 1)
            wait_for_copy(main, arrived[i % 2])
            yield buffers[i % 2][:, : _length(pieces)]
            released[i % 2].record(main)

    fetch(0)
    return blocks()
