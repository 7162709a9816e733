"""A pool of host memory as the device engine uses it: seen by devices, emptied by finalizers."""

from __future__ import annotations

import threading
from collections import deque
from typing import Any

import torch
from torch import Tensor

from alaya_hf.engine.device.store.tensor import seen_by
from alaya_hf.kernels.gpu.store_format import StoreFormat
from alaya_hf.storage.allocators import Allocator, Contiguous, KVPool, KVShape


def pool_bytes(allocator: Allocator, shape: KVShape, sequences: int, tokens: int) -> int:
    """Bytes in which an allocator holds so many sequences of `tokens` tokens, one of which grows by a block or moves."""
    if isinstance(allocator, Contiguous):
        return sequences * allocator.max_tokens * shape.token_bytes
    block = getattr(allocator, "block", 1)
    # A block more for the one that is copied before it is written; a run of a layer more for the one that moves.
    spare = block * shape.token_bytes if hasattr(allocator, "block") else (tokens + 1024) * shape.row_bytes
    return (sequences + 1) * spare + sequences * -(-tokens // block) * block * shape.token_bytes


class HostPool:
    """A pool in pinned memory, and the memory as devices see it.

    Parameters
    ----------
    allocator : Allocator
    shape : KVShape
        Whose rows are the store's lines, all heads of a token together.
    form : StoreFormat
    capacity : int
        Bytes.

    Attributes
    ----------
    pool : KVPool
    memory : Tensor ``[n]``
        The pool's bytes in the store's dtype.
    lock : RLock
        Held while the pool changes: caches of several threads may share it.

    Raises
    ------
    HostMemoryError
    """

    def __init__(self, allocator: Allocator, shape: KVShape, form: StoreFormat, capacity: int) -> None:
        self.allocator = allocator
        self.pool: KVPool[Any] = allocator.open(shape, capacity, "cpu", pinned=True)
        whole = capacity // shape.token_bytes * shape.token_bytes
        self.memory = self.pool.arena.view(0, whole).view(form.dtype)
        self.lock = threading.RLock()
        self._views: dict[torch.device, Tensor] = {}
        # Finalizers run wherever the garbage collector does, also inside the pool: they only leave a note.
        self.returned: deque[int] = deque()
        self._stale = False

    @property
    def block(self) -> int:
        """Tokens of a block; 0: every sequence is one run."""
        return int(getattr(self.pool, "block", 0))

    def view(self, device: torch.device) -> Tensor:
        """`memory` as kernels of a device see it."""
        if device not in self._views:
            self._views[device] = seen_by(self.memory, device)
        return self._views[device]

    def collect(self) -> None:
        """Take back what nobody refers to any more, and let no one have it before the devices are done with it."""
        while self.returned:
            self.pool.free(self.returned.popleft())
            self._stale = True
        if self._stale:
            self.wait()

    def wait(self) -> None:
        """Until all devices have done what they were given to do: the host is about to move lines."""
        for device in self._views:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        self._stale = False
