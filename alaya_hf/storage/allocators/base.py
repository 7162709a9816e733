"""What an allocator of KV memory is: parameters that open a pool, and the pool."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from itertools import count
from typing import Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from alaya_hf.errors import AlayaError, ConfigError, PoolFullError, UnknownSequenceError
from alaya_hf.storage.allocators.arena import Accounts, Arena
from alaya_hf.storage.allocators.shape import KVShape


class TokenRun(NamedTuple):
    """Consecutive tokens whose rows are consecutive in memory.

    Attributes
    ----------
    offset : int
        Byte offset of the first row in the pool's arena.
    tokens : int
    """

    offset: int
    tokens: int


class EvenRuns(NamedTuple):
    """Runs of equally many consecutive tokens, at even distances in memory: what one copy of rectangles takes.

    Attributes
    ----------
    offset : int
        Byte offset of the first row in the pool's arena.
    tokens : int
        Of each run.
    runs : int
        How many there are.
    step : int
        Bytes from a run to the next; 0 if there is one.
    """

    offset: int
    tokens: int
    runs: int
    step: int


@dataclass(frozen=True)
class Extents:
    """Where a sequence lies, cut at the same tokens in all layers.

    Attributes
    ----------
    starts : ndarray
        ``[n + 1]`` int64: piece ``i`` holds the tokens ``[starts[i], starts[i + 1])``. The last piece reaches up to the end of
        its memory and so perhaps beyond the sequence's last token.
    offsets : ndarray
        ``[layers, n]`` int64, byte offset of the first row of each piece.
    tokens : int
        The sequence's length.
    """

    starts: np.ndarray
    offsets: np.ndarray
    tokens: int


@dataclass(frozen=True)
class AllocatorStats:
    """What a pool holds and has done. Bytes throughout.

    Attributes
    ----------
    capacity : int
    reserved : int
        Taken by living sequences; what they share counts once.
    used : int
        Of those, holding a token. Tokens that sequences share in memory count once, copies count each.
    wasted : int
        ``reserved - used``: reserved ahead, unfilled ends of blocks and pages, rounding.
    peak_reserved : int
        Most ever reserved, also in the middle of an operation.
    fragmentation : float
        ``1 - largest free run / free bytes``. For `contiguous` and `dynamic` it is room that a large request cannot have; for
        `paged` and `segment`, which take any free block, it costs transfers only; 0 for `virtual`.
    copies : int
        Copies inside the pool: moves of grown sequences, copy-on-write, forks of pools that cannot share.
    bytes_copied : int
    sequences : int
        Living ones.
    """

    capacity: int
    reserved: int
    used: int
    wasted: int
    peak_reserved: int
    fragmentation: float
    copies: int
    bytes_copied: int
    sequences: int


class SequenceState(Protocol):
    """What a pool keeps of a sequence; each pool adds its own."""

    length: int


S = TypeVar("S", bound=SequenceState)


class KVPool(ABC, Generic[S]):
    """Keys and values of many sequences in one piece of memory.

    Sequences have numbers, which are never used again. Written tokens that a fork shares are never changed under it: whoever
    writes first gets a copy (copy-on-write). An operation that fails leaves the pool as it was.

    Parameters
    ----------
    shape : KVShape
    arena : Arena
        What the sequences lie in.
    """

    def __init__(self, shape: KVShape, arena: Arena) -> None:
        self.shape, self.arena = shape, arena
        self._states: dict[int, S] = {}
        self._numbers = count()
        self._peak = self._copies = self._copied = 0

    def allocate(self, tokens: int) -> int:
        """A new sequence with room for ``tokens`` tokens, contents undefined; returns its number.

        Raises
        ------
        PoolFullError
        """
        return self._enter(self._open(_count(tokens)))

    def extend(self, sequence: int, tokens: int) -> None:
        """Append ``tokens`` tokens, contents undefined; the ones before keep theirs but may move.

        Raises
        ------
        PoolFullError, UnknownSequenceError
        """
        state = self._state(sequence)
        self._grow(state, _count(tokens))
        self._note()

    def fork(self, sequence: int, tokens: int | None = None) -> int:
        """A new sequence with the same first ``tokens`` tokens (default: all), shared in memory where the pool can.

        Raises
        ------
        PoolFullError, UnknownSequenceError
        """
        state = self._state(sequence)
        tokens = state.length if tokens is None else _count(tokens)
        if tokens > state.length:
            raise AlayaError(f"cannot fork {tokens:,} tokens of a sequence that has {state.length:,}. Ask for fewer.")
        return self._enter(self._share(state, tokens))

    def free(self, sequence: int) -> None:
        """Give a sequence's memory back, except what others share. Views on it must not be used any more.

        Raises
        ------
        UnknownSequenceError
        """
        self._close(self._state(sequence))
        del self._states[sequence]

    def length(self, sequence: int) -> int:
        """Tokens of a sequence."""
        return self._state(sequence).length

    @property
    def has_memory(self) -> bool:
        """Whether there are keys and values behind the accounts."""
        return not isinstance(self.arena, Accounts)

    @property
    def sequences(self) -> list[int]:
        """Numbers of the living sequences."""
        return list(self._states)

    def transfer_runs(self, sequence: int) -> Extents:
        """Where the sequence lies, for :func:`alaya_hf.storage.transfer.transfer`."""
        return self._extents(self._state(sequence))

    def token_runs(self, sequence: int, layer: int) -> list[TokenRun]:
        """A layer's rows in the order of the tokens, in maximal runs: what an attention kernel walks.

        Cost linear in the blocks of the sequence.
        """
        return [TokenRun(*run) for run in zip(*(part.tolist() for part in self._runs(sequence, layer)), strict=True)]

    def even_runs(self, sequence: int, layer: int) -> list[EvenRuns]:
        """The same runs, those of neighbouring blocks together: as few as the sequence has pieces of memory.

        Cost in Python linear in the pieces, in numpy in the blocks.
        """
        offsets, tokens = self._runs(sequence, layer)
        if not len(offsets):
            return []
        step = self.block_step
        apart = (offsets[1:] != offsets[:-1] + step) | (tokens[1:] != tokens[:-1])
        first = np.flatnonzero(np.r_[True, apart])
        counts = np.diff(np.r_[first, len(offsets)])
        found = zip(offsets[first].tolist(), tokens[first].tolist(), counts.tolist(), strict=True)
        return [EvenRuns(offset, size, count, step if count > 1 else 0) for offset, size, count in found]

    def rows(self, sequence: int, layer: int) -> list[Tensor]:
        """The same runs as strided views ``[kv_heads, tokens, 2, head_dim]``. Read only, and only until the next operation.

        Raises
        ------
        UnavailableError
            If the pool only keeps accounts.
        """
        row = self.shape.row_bytes
        runs = self.token_runs(sequence, layer)
        return [self.shape.rows(self.arena.view(offset, tokens * row)) for offset, tokens in runs]

    def write(self, sequence: int, layer: int, start: int, kv: Tensor) -> None:
        """Write tokens of one layer from ``start`` on, after a copy where they are shared.

        Parameters
        ----------
        sequence, layer, start : int
        kv : Tensor
            ``[kv_heads, n, 2, head_dim]``, on any device; ``start + n`` at most the sequence's length.

        Raises
        ------
        PoolFullError
            If there is no room for the copy.
        UnknownSequenceError, UnavailableError
        """
        state, shape = self._state(sequence), self.shape
        if kv.dim() != 4 or kv.shape[::2] != (shape.kv_heads, 2) or kv.shape[3] != shape.head_dim:
            raise AlayaError(
                f"expected keys and values [{shape.kv_heads}, n, 2, {shape.head_dim}], got {list(kv.shape)}. "
                "Put key and value of a head side by side."
            )
        if not 0 <= layer < shape.layers:
            raise AlayaError(f"expected a layer from 0 to {shape.layers - 1}, got {layer!r}")
        stop = start + kv.shape[1]
        if not 0 <= start <= stop <= state.length:
            raise AlayaError(
                f"cannot write the tokens [{start:,}, {stop:,}) of a sequence of {state.length:,} tokens. Extend it first."
            )
        self._own(state, start, stop)
        self._note()
        begin = 0
        for rows in self.rows(sequence, layer):
            end = begin + rows.shape[1]
            left, right = max(begin, start), min(end, stop)
            if left < right:
                rows[:, left - begin : right - begin].copy_(kv[:, left - start : right - start].detach())
            begin = end

    def own(self, sequence: int, start: int, stop: int) -> None:
        """Copy what is shared of the tokens ``[start, stop)``, for who writes to where they lie. They may move.

        Raises
        ------
        PoolFullError
            If there is no room for the copy.
        UnknownSequenceError
        """
        state = self._state(sequence)
        if not 0 <= start <= stop <= state.length:
            raise AlayaError(f"cannot own the tokens [{start:,}, {stop:,}) of a sequence of {state.length:,} tokens.")
        self._own(state, start, stop)
        self._note()

    @property
    def layer_stride(self) -> int | None:
        """Bytes from a token's row in a layer to its row in the next, the same for all tokens; None where layers lie apart."""
        return None

    @property
    def block_step(self) -> int:
        """Bytes from a block's rows in a layer to those of the block behind it in memory; 0 where those join."""
        return 0

    @property
    def stats(self) -> AllocatorStats:
        """Counters and sizes now. Linear in the blocks of all sequences."""
        reserved, used, (free, largest) = self._reserved(), self._used(), self._free_runs()
        return AllocatorStats(
            capacity=self.arena.capacity,
            reserved=reserved,
            used=used,
            wasted=reserved - used,
            peak_reserved=self._peak,
            fragmentation=1 - largest / free if free else 0.0,
            copies=self._copies,
            bytes_copied=self._copied,
            sequences=len(self._states),
        )

    # What a kind of pool has to say.

    @abstractmethod
    def _open(self, tokens: int) -> S:
        """Memory for a new sequence."""

    @abstractmethod
    def _grow(self, state: S, tokens: int) -> None:
        """Append, making the new tokens the sequence's own."""

    @abstractmethod
    def _share(self, state: S, tokens: int) -> S:
        """A state with the same first tokens."""

    @abstractmethod
    def _close(self, state: S) -> None:
        """Give the memory back."""

    @abstractmethod
    def _extents(self, state: S) -> Extents:
        """See :meth:`transfer_runs`."""

    @abstractmethod
    def _reserved(self) -> int:
        """Bytes that living sequences take; constant time."""

    @abstractmethod
    def _used(self) -> int:
        """Bytes of those that hold a token."""

    @abstractmethod
    def _free_runs(self) -> tuple[int, int]:
        """Free units, and those of the largest free run."""

    def _own(self, state: S, start: int, stop: int) -> None:  # noqa: B027  (nothing to do where nothing is shared)
        """Copy what is shared of the tokens ``[start, stop)``."""

    # For the kinds.

    def _runs(self, sequence: int, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """A layer's maximal runs in the order of the tokens: byte offsets and tokens, ``[n]`` int64 each."""
        extents = self._extents(self._state(sequence))
        offsets = extents.offsets[layer]
        tokens = np.diff(np.minimum(extents.starts, extents.tokens))
        offsets, tokens = offsets[tokens > 0], tokens[tokens > 0]
        if not len(offsets):
            return offsets, tokens
        first = np.flatnonzero(np.r_[True, offsets[1:] != offsets[:-1] + tokens[:-1] * self.shape.row_bytes])
        return offsets[first], np.add.reduceat(tokens, first)

    def _copy(self, source: int, target: int, size: int) -> None:
        self.arena.copy(source, target, size)
        self._copies += 1
        self._copied += size

    def _note(self) -> None:
        self._peak = max(self._peak, self._reserved())

    def _full(self, needed: int, free: int, why: str = "") -> PoolFullError:
        return PoolFullError(
            f"the pool needs {needed:,} more bytes{why}, but {free:,} of its {self.arena.capacity:,} bytes are free. "
            "Free sequences, shorten this one or open a larger pool."
        )

    def _enter(self, state: S) -> int:
        number = next(self._numbers)
        self._states[number] = state
        self._note()
        return number

    def _state(self, sequence: int) -> S:
        try:
            return self._states[sequence]
        except KeyError:
            raise UnknownSequenceError(
                f"the pool holds no sequence {sequence!r}: it was freed, or is another pool's. Living: {self.sequences[:20]}."
            ) from None


class Allocator(ABC):
    """A strategy. Implementations are frozen dataclasses of their parameters, registered by name."""

    kind: str

    @abstractmethod
    def open(
        self, shape: KVShape, capacity: int, device: torch.device | str | None = None, pinned: bool = False
    ) -> KVPool:
        """A pool.

        Parameters
        ----------
        shape : KVShape
        capacity : int
            Bytes.
        device : torch.device or str, optional
            Where the memory is. None: nowhere, the pool only keeps accounts.
        pinned : bool
            Host memory that a GPU reads and writes, from the pool of this process (:mod:`alaya_hf.storage.pinned`).

        Raises
        ------
        HostMemoryError, PoolFullError
            If the memory is not to be had.
        UnavailableError
            If the strategy cannot work there.
        """


def check_positive(allocator: Allocator, *names: str) -> None:
    """Refuse parameters that are not integers of at least 1.

    Raises
    ------
    ConfigError
    """
    for name in names:
        value = getattr(allocator, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"allocator.{name} must be an integer of at least 1, but got {value!r}.")


def one_piece(offsets: list[int], length: int) -> Extents:
    """Extents of a sequence whose layers are one run each."""
    starts = np.array([0, length] if length else [0], np.int64)
    return Extents(starts, np.array(offsets, np.int64).reshape(-1, 1)[:, : len(starts) - 1], length)


def _count(tokens: int) -> int:
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 0:
        raise AlayaError(f"expected a number of tokens of at least 0, got {tokens!r}")
    return tokens
