"""vAttention: contiguous addresses, memory mapped on demand."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from alaya_hf.errors import PoolFullError, UnavailableError
from alaya_hf.registry import ALLOCATORS
from alaya_hf.storage.allocators.base import Allocator, Extents, KVPool, check_positive, one_piece
from alaya_hf.storage.allocators.cuda_pages import CudaPages
from alaya_hf.storage.allocators.host_pages import HostPages
from alaya_hf.storage.allocators.pages import AccountedPages, Pages
from alaya_hf.storage.allocators.shape import KVShape
from alaya_hf.storage.blocks import LARGE


@dataclass
class _State:
    length: int
    base: int
    pages: np.ndarray  # [layers, n] int64


class VirtualPool(KVPool[_State]):
    """``[layers, max_tokens, kv_heads, 2, head_dim]`` of addresses per sequence, pages behind the tokens that are there.

    A fork maps the same pages a second time.
    """

    arena: Pages

    def __init__(self, shape: KVShape, arena: Pages, max_tokens: int) -> None:
        super().__init__(shape, arena)
        self.max_tokens = max_tokens
        self._layer = -(-max_tokens * shape.row_bytes // arena.page) * arena.page
        self._size = shape.layers * self._layer
        self._references = np.zeros(arena.pages, np.int32)
        self._spare: list[int] = []  # reservations of sequences that are gone
        self._scratch: int | None = None

    @property
    def layer_stride(self) -> int:
        """See :attr:`KVPool.layer_stride`."""
        return self._layer

    def _open(self, tokens: int) -> _State:
        self._check(tokens)
        state = _State(0, self._reserve(), np.zeros((self.shape.layers, 0), np.int64))
        try:
            self._grow(state, tokens)
        except Exception:
            self._spare.append(state.base)
            raise
        return state

    def _grow(self, state: _State, tokens: int) -> None:
        if tokens == 0:
            return
        length = state.length + tokens
        self._check(length)
        row, page = self.shape.row_bytes, self.arena.page
        new = self._pages(length) - state.pages.shape[1]
        shared = self._shared(state, state.length * row, state.length * row + 1 if state.length * row % page else 0)
        fresh = self._take(self.shape.layers * (new + len(shared)))
        added = fresh[: self.shape.layers * new].reshape(self.shape.layers, new)
        done = 0
        try:
            for layer in range(self.shape.layers):
                self.arena.map(self._address(state, layer, state.pages.shape[1]), added[layer].tolist())
                done += 1
        except Exception:
            for layer in range(done):
                self.arena.unmap(self._address(state, layer, state.pages.shape[1]), new)
            self._references[fresh] = 0
            self.arena.give(fresh.tolist())
            raise
        state.pages = np.concatenate([state.pages, added], axis=1)
        self._unshare(state, shared, fresh[self.shape.layers * new :])
        state.length = length

    def _own(self, state: _State, start: int, stop: int) -> None:
        shared = self._shared(state, start * self.shape.row_bytes, stop * self.shape.row_bytes if stop > start else 0)
        self._unshare(state, shared, self._take(self.shape.layers * len(shared)))

    def _share(self, state: _State, tokens: int) -> _State:
        fork = _State(tokens, self._reserve(), state.pages[:, : self._pages(tokens)].copy())
        done = 0
        try:
            for layer in range(self.shape.layers):
                self.arena.map(self._address(fork, layer, 0), fork.pages[layer].tolist())
                done += 1
        except Exception:
            for layer in range(done):
                self.arena.unmap(self._address(fork, layer, 0), fork.pages.shape[1])
            self._spare.append(fork.base)
            raise
        self._references[fork.pages] += 1
        return fork

    def _close(self, state: _State) -> None:
        for layer in range(self.shape.layers):
            self.arena.unmap(self._address(state, layer, 0), state.pages.shape[1])
        self._references[state.pages] -= 1
        self.arena.give(state.pages[self._references[state.pages] == 0].tolist())
        self._spare.append(state.base)

    def _extents(self, state: _State) -> Extents:
        return one_piece([self._address(state, layer, 0) for layer in range(self.shape.layers)], state.length)

    def _reserved(self) -> int:
        return self.arena.taken * self.arena.page

    def _used(self) -> int:
        filled = np.zeros(self.arena.pages, np.int64)
        for state in self._states.values():
            if state.pages.shape[1]:
                filled[state.pages[:, :-1]] = self.arena.page
                ends = state.pages[:, -1]
                here = state.length * self.shape.row_bytes - (state.pages.shape[1] - 1) * self.arena.page
                filled[ends] = np.maximum(filled[ends], here)
        return int(filled.sum())

    def _free_runs(self) -> tuple[int, int]:
        free = self.arena.pages - self.arena.taken
        return free, free  # any page goes anywhere

    def _pages(self, tokens: int) -> int:
        return -(-tokens * self.shape.row_bytes // self.arena.page)

    def _address(self, state: _State, layer: int, page: int) -> int:
        return state.base + layer * self._layer + page * self.arena.page

    def _reserve(self) -> int:
        return self._spare.pop() if self._spare else self.arena.reserve(self._size)

    def _take(self, count: int) -> np.ndarray:
        pages = np.array(self.arena.take(count), np.int64)
        self._references[pages] = 1
        return pages

    def _shared(self, state: _State, start: int, stop: int) -> np.ndarray:
        """Places of the pages that hold bytes ``[start, stop)`` of a layer and that others refer to as well: the same in all."""
        places = np.arange(start // self.arena.page, -(-stop // self.arena.page))
        return places[self._references[state.pages[0, places]] > 1]

    def _unshare(self, state: _State, places: np.ndarray, fresh: np.ndarray) -> None:
        """Replace pages by copies, seen at a second address while both are needed."""
        if not len(places):
            return
        left = fresh.tolist()[::-1]
        try:
            for layer in range(self.shape.layers):
                for place in places.tolist():
                    self._replace(state, layer, place, left[-1])
                    left.pop()
        except Exception:  # the pages that were replaced hold the same as the ones before
            self._references[left] = 0
            self.arena.give(left)
            raise

    def _replace(self, state: _State, layer: int, place: int, page: int) -> None:
        if self._scratch is None:
            self._scratch = self.arena.reserve(self.arena.page)
        address, old = self._address(state, layer, place), int(state.pages[layer, place])
        filled = state.length * self.shape.row_bytes - place * self.arena.page
        self.arena.map(self._scratch, [page])
        self._copy(address, self._scratch, min(self.arena.page, filled))
        self.arena.unmap(self._scratch, 1)
        self.arena.unmap(address, 1)
        try:
            self.arena.map(address, [page])
        except Exception:
            self.arena.map(address, [old])
            raise
        self._references[old] -= 1
        state.pages[layer, place] = page

    def _check(self, tokens: int) -> None:
        if tokens > self.max_tokens:
            raise PoolFullError(
                f"a sequence of {tokens:,} tokens exceeds the {self.max_tokens:,} that addresses are reserved for. "
                "Shorten it or raise the allocator's max_tokens."
            )


@ALLOCATORS.register("virtual")
@dataclass(frozen=True)
class Virtual(Allocator):
    """vAttention (arXiv 2405.04437): addresses for the longest sequence, memory as it grows, so that kernels for contiguous
    keys and values work unchanged. Sharing by mapping a page twice is an addition of ours.

    Parameters
    ----------
    max_tokens : int
        Tokens of address space per sequence.
    page : int
        Bytes per page; every layer of a sequence leaves half a page empty on average. On a GPU a multiple of 2 MiB.
    """

    max_tokens: int = 524288
    page: int = LARGE

    def __post_init__(self) -> None:
        check_positive(self, "max_tokens", "page")

    def open(
        self, shape: KVShape, capacity: int, device: torch.device | str | None = None, pinned: bool = False
    ) -> VirtualPool:
        """See :meth:`Allocator.open`.

        Raises
        ------
        UnavailableError
            ``pinned``; on a GPU without cuda-python; on a host other than Linux.
        """
        if pinned:
            raise UnavailableError("memory that is mapped on demand cannot be pinned. Use the allocator 'segment'.")
        where = None if device is None else torch.device(device)
        arena: Pages
        if where is None:
            arena = AccountedPages(capacity, self.page)
        elif where.type == "cpu":
            arena = HostPages(capacity, self.page)
        else:
            arena = CudaPages(capacity, self.page, where)
        return VirtualPool(shape, arena, self.max_tokens)
