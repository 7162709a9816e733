"""The sequences of a batch in a pool, shared by the layers of a cache."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from alaya_hf.engine.device.store.pool import HostPool, pool_bytes
from alaya_hf.errors import PoolFullError
from alaya_hf.kernels.gpu.store_format import StoreFormat
from alaya_hf.storage.allocators import Allocator, EvenRuns, KVShape
from alaya_hf.storage.transfer import transfer

STEP = 1024  # tokens that sequences grow by


class Group:
    """A sequence per row of a batch, of one length, in all layers.

    Layers of a cache grow, crop and reorder one after the other. The first one changes the sequences of all, the others find
    them changed; :attr:`claimed` says which layers a group serves.

    Parameters
    ----------
    allocator : Allocator
    shape : KVShape
    form : StoreFormat
    batch : int
    fixed : int, optional
        Bytes of the pool. Default: as many as are needed; a pool that is full makes room by moving to a larger one.

    Attributes
    ----------
    tokens : int
        Lines that every row has room for.
    pool : HostPool or None
        None before there is a token.
    version : int
        Counts changes of where lines lie.
    claimed : set of int
        Layers, counted from the pool's first, whose lines this group holds.
    shared : bool
        Whether lines may be another group's as well.

    Notes
    -----
    A pool is opened at the first token, and lives as long as a group of it does. Forks (beams, copies of a cache) stay in it.
    """

    def __init__(
        self, allocator: Allocator, shape: KVShape, form: StoreFormat, batch: int, fixed: int | None = None
    ) -> None:
        self.allocator, self.shape, self.form, self.batch, self.fixed = allocator, shape, form, batch, fixed
        self.tokens = self.version = 0
        self.pool: HostPool | None = None
        self.claimed: set[int] = set()
        self.shared = False
        self._sequences: list[int] = []
        self._finalizer: weakref.finalize | None = None
        self._tables: dict[torch.device, Tensor] = {}
        self._runs: dict[tuple[int, int], list[EvenRuns]] = {}
        # What layers have done with the group: a fork made before is no fork of what is there now.
        self._done = 0
        self._forks: weakref.WeakValueDictionary[tuple[tuple[int, ...], ...], Group] = weakref.WeakValueDictionary()

    # Changes ----------------------------------------------------------------------------------------------------------

    def touch(self) -> None:
        """A layer is about to change lines."""
        self._done += 1

    def grow(self, tokens: int, capacity: int) -> None:
        """Make every sequence at least `tokens` long, with room in the pool for `capacity` if it has to be opened.

        Raises
        ------
        HostMemoryError
            If the host has no room for a larger pool.
        PoolFullError
            If the pool's size was given. What the sequences held is where it was.
        """
        self.touch()
        if tokens <= self.tokens:
            return
        wanted = -(-tokens // STEP) * STEP
        most = getattr(self.allocator, "max_tokens", wanted)
        wanted = max(tokens, min(wanted, most))
        if self.pool is None:
            self._hold(self._open(self.batch, max(wanted, min(capacity, most))), [])
        pool = self.pool
        assert pool is not None
        with pool.lock:
            pool.collect()
            if self.tokens:
                pool.wait()  # what is copied on growing must have been written
            try:
                self._extend(pool, self._sequences, wanted)
            except PoolFullError:
                if self.fixed is not None or wanted > most:
                    raise
                self._move(max(wanted, capacity, self.tokens + self.tokens // 2))
                assert self.pool is not None
                self._extend(self.pool, self._sequences, wanted)
            self.tokens = wanted
            self._publish()

    def fork(self, rows: Sequence[int], used: Sequence[int], slot: int) -> Group:
        """The group whose row ``i`` has the first ``used[rows[i]]`` tokens of row ``rows[i]``, for one layer of it.

        The layers that ask for the same one after the other get the same one.

        Raises
        ------
        HostMemoryError, PoolFullError
        """
        key = (tuple(rows), tuple(used), (self._done,))
        known = self._forks.get(key)
        if known is None or slot in known.claimed:
            known = self._forked(rows, used)
            self._forks[key] = known
        known.claimed.add(slot)
        return known

    def own(self, used: Sequence[int]) -> None:
        """What is shared with other groups from ``used[row]`` on becomes this group's own, by copies.

        Raises
        ------
        HostMemoryError, PoolFullError
        """
        self.touch()
        pool = self.pool
        if pool is None or not self.shared:
            return
        with pool.lock:
            pool.collect()
            pool.wait()
            try:
                for sequence, start in zip(self._sequences, used, strict=True):
                    pool.pool.own(sequence, min(start, self.tokens), self.tokens)
            except PoolFullError:
                if self.fixed is not None:
                    raise
                self._move(self.tokens)
            self._publish()

    def _forked(self, rows: Sequence[int], used: Sequence[int]) -> Group:
        fork = Group(self.allocator, self.shape, self.form, len(rows), self.fixed)
        pool = self.pool
        if pool is None:
            return fork
        with pool.lock:
            pool.collect()
            pool.wait()
            made: list[int] = []
            try:
                for row in rows:
                    made.append(pool.pool.fork(self._sequences[row], min(used[row], self.tokens)))
                    pool.pool.extend(made[-1], self.tokens - pool.pool.length(made[-1]))
            except PoolFullError:
                for sequence in made:
                    pool.pool.free(sequence)
                if self.fixed is not None:
                    raise
                larger = self._open(len(rows), self.tokens)
                made = [transfer(pool.pool, self._sequences[row], larger.pool)[0] for row in rows]
                pool = larger
            else:
                fork.shared = self.shared = True
            fork._hold(pool, made)
            fork.tokens = self.tokens
        return fork

    def _open(self, sequences: int, tokens: int) -> HostPool:
        capacity = pool_bytes(self.allocator, self.shape, sequences, tokens) if self.fixed is None else self.fixed
        return HostPool(self.allocator, self.shape, self.form, capacity)

    def _extend(self, pool: HostPool, sequences: list[int], tokens: int) -> None:
        while len(sequences) < self.batch:
            sequences.append(pool.pool.allocate(0))
        for sequence in sequences:
            pool.pool.extend(sequence, max(0, tokens - pool.pool.length(sequence)))

    def _move(self, tokens: int) -> None:
        """To a pool of its own that has room for so many tokens."""
        assert self.pool is not None
        larger = self._open(self.batch, tokens)
        self._hold(larger, [transfer(self.pool.pool, sequence, larger.pool)[0] for sequence in self._sequences])
        self._tables.clear()
        self.shared = False

    def _hold(self, pool: HostPool, sequences: list[int]) -> None:
        if self._finalizer is not None:
            self._finalizer()
        self.pool, self._sequences = pool, sequences
        self._finalizer = weakref.finalize(self, _give_back, pool, sequences)
        self._finalizer.atexit = False

    # Where lines lie --------------------------------------------------------------------------------------------------

    def runs(self, row: int, slot: int) -> tuple[int, list[EvenRuns]]:
        """Bytes of the pool before those that the runs of a layer count from, and its lines of a row in maximal runs."""
        if self.pool is None:
            return 0, []
        stride = self.pool.pool.layer_stride
        # Walked once for all layers where they lie alike.
        like = slot if stride is None else 0
        found = self._runs.get((row, like))
        if found is None:
            found = self._runs[row, like] = self.pool.pool.even_runs(self._sequences[row], like)
        return slot * (stride or 0), found

    def table(self, slot: int, device: torch.device) -> tuple[int, Tensor]:
        """Elements of the pool before those that the table of a layer counts from, and the table ``[batch, blocks]`` int64.

        The table stays in place while the pool is the same.
        """
        assert self.pool is not None
        stride = self.pool.pool.layer_stride
        if device not in self._tables:
            blocks = (
                self.pool.pool.arena.capacity // (self.pool.block * self.shape.token_bytes) if self.pool.block else 1
            )
            shape = (1 if stride is not None else self.shape.layers, self.batch, max(1, blocks))
            with torch.inference_mode(False):  # what is made in inference mode could not be written to later
                self._tables[device] = torch.full(shape, -1, dtype=torch.int64, device=device)
            self._fill(self._tables[device])
        table = self._tables[device]
        if stride is None:
            return 0, table[slot]
        return slot * stride // self.form.dtype.itemsize, table[0]

    def _publish(self) -> None:
        self.version += 1
        self._runs.clear()
        for table in self._tables.values():
            self._fill(table)

    def _fill(self, table: Tensor) -> None:
        """Write where lines lie, after what the device has been given to do."""
        assert self.pool is not None
        numbers = np.full(table.shape, -1, np.int64)
        for row, sequence in enumerate(self._sequences):
            offsets = self.pool.pool.transfer_runs(sequence).offsets[: len(numbers)]
            numbers[:, row, : offsets.shape[1]] = offsets // self.form.dtype.itemsize
        table.copy_(torch.from_numpy(numbers))


def _give_back(pool: HostPool, sequences: list[int]) -> None:
    pool.returned.extend(sequences)
