"""Physical memory in pages and address space to map it into."""

from __future__ import annotations

import heapq
from abc import abstractmethod
from collections.abc import Sequence

from alaya_hf.errors import ConfigError, PoolFullError
from alaya_hf.storage.allocators.arena import Accounts, Arena


class Pages(Arena):
    """Pages with numbers from 0, handed out lowest first, and reservations of addresses to map them into.

    Pages that come back stay with the pool, ready to be mapped again, until :meth:`trim`. Byte offsets are addresses.

    Parameters
    ----------
    capacity : int
        Bytes of physical memory at most, rounded down to whole pages.
    page : int
        Bytes per page.
    """

    def __init__(self, capacity: int, page: int) -> None:
        super().__init__(capacity // page * page)
        self.page = page
        self.pages = capacity // page
        self.taken = 0
        self._made = 0
        self._idle: list[int] = []
        self._dropped: list[int] = []  # made once, given back to the system

    def take(self, count: int) -> list[int]:
        """Numbers of ``count`` pages.

        Raises
        ------
        PoolFullError
            If there are fewer, or the system has no more memory; none are taken then.
        """
        if count > self.pages - self.taken:
            free = (self.pages - self.taken) * self.page
            raise PoolFullError(
                f"the pool needs {count * self.page:,} more bytes, but {free:,} of its {self.capacity:,} bytes are free. "
                "Free sequences, shorten this one or open a larger pool."
            )
        found: list[int] = []
        try:
            while len(found) < count:
                if self._idle:
                    number = heapq.heappop(self._idle)
                elif self._dropped:
                    number = self._dropped[-1]
                    self._make(number)
                    self._dropped.pop()
                else:
                    number = self._made
                    self._make(number)
                    self._made += 1
                found.append(number)
        except Exception:
            for number in found:
                heapq.heappush(self._idle, number)
            raise
        self.taken += count
        return found

    def give(self, pages: Sequence[int]) -> None:
        """Bring pages back that are mapped nowhere any more."""
        for page in pages:
            heapq.heappush(self._idle, page)
        self.taken -= len(pages)

    def trim(self) -> int:
        """Give the memory of unused pages back to the system; returns its bytes."""
        for page in self._idle:
            self._drop(page)
        size = len(self._idle) * self.page
        self._dropped += self._idle
        self._idle = []
        return size

    @abstractmethod
    def reserve(self, size: int) -> int:
        """The address of ``size`` bytes of address space, a multiple of the page, without memory behind it.

        Raises
        ------
        PoolFullError
        """

    @abstractmethod
    def release(self, address: int, size: int) -> None:
        """Give a reservation back, of which nothing is mapped."""

    @abstractmethod
    def map(self, address: int, pages: Sequence[int]) -> None:
        """Put pages behind consecutive addresses of a reservation; a page may be mapped at several places.

        Raises
        ------
        PoolFullError
            If the system refuses; nothing is mapped then.
        """

    @abstractmethod
    def unmap(self, address: int, count: int) -> None:
        """Take ``count`` pages away from consecutive addresses, once the device has finished with them."""

    @abstractmethod
    def _make(self, page: int) -> None:
        """Memory for a page."""

    @abstractmethod
    def _drop(self, page: int) -> None:
        """Give it back to the system."""


class AccountedPages(Accounts, Pages):
    """No memory at all: for counting what a workload would take."""

    def __init__(self, capacity: int, page: int) -> None:
        Pages.__init__(self, capacity, page)
        self._next = 0

    def reserve(self, size: int) -> int:
        """See :meth:`Pages.reserve`."""
        address, self._next = self._next, self._next + size
        return address

    def release(self, address: int, size: int) -> None:
        """See :meth:`Pages.release`."""

    def map(self, address: int, pages: Sequence[int]) -> None:
        """See :meth:`Pages.map`."""

    def unmap(self, address: int, count: int) -> None:
        """See :meth:`Pages.unmap`."""

    def _make(self, page: int) -> None: ...

    def _drop(self, page: int) -> None: ...


def check_page(page: int, granularity: int) -> None:
    """Refuse a page size that the system cannot map.

    Raises
    ------
    ConfigError
    """
    if page % granularity:
        raise ConfigError(f"allocator.page must be a multiple of {granularity:,} bytes here, but got {page:,}.")
