"""Blocks of a few large regions: best fit, neighbours joined again when they come back."""

from __future__ import annotations

from bisect import bisect_left, insort

SMALL, LARGE = 1 << 12, 1 << 21
"""Sizes and addresses are multiples of `SMALL` bytes (a page), those of blocks from `LARGE` bytes on of `LARGE` (a huge page)."""


def block_bytes(size: int) -> int:
    """Bytes of the block that serves `size` bytes, at least one page."""
    unit = SMALL if size < LARGE else LARGE
    return max(1, -(-size // unit)) * unit


class BlockAllocator:
    """Which bytes of which region are taken. Knows addresses only and touches no memory.

    Blocks never span two regions, not even neighbouring ones: each region is registered with CUDA by itself.

    Notes
    -----
    Best fit over a list of free blocks in the order of their addresses, immediate coalescing (Knuth, TAOCP 1, 2.5). Both
    operations are linear in the number of free blocks: a store asks for few and large ones.
    """

    def __init__(self) -> None:
        self._regions: dict[int, int] = {}  # start -> size
        self._free: list[tuple[int, int, int]] = []  # start, size, region; in the order of starts
        self._taken: dict[int, tuple[int, int]] = {}  # start -> size, region
        self.used = 0

    @property
    def held(self) -> int:
        """Bytes of all regions."""
        return sum(self._regions.values())

    @property
    def largest(self) -> int:
        """Bytes of the largest free block."""
        return max((size for _, size, _ in self._free), default=0)

    @property
    def idle(self) -> list[int]:
        """Starts of the regions of which nothing is taken."""
        return [start for start, size, region in self._free if start == region and size == self._regions[region]]

    def add(self, start: int, size: int) -> None:
        """Take a region in.

        Parameters
        ----------
        start, size : int
            Address and bytes, multiples of `LARGE`.

        Raises
        ------
        ValueError
        """
        if size <= 0 or start % LARGE or size % LARGE:
            raise ValueError(
                f"expected a region whose address and size are multiples of {LARGE:,}, got {start:#x}, {size:,}"
            )
        if any(start < other + length and other < start + size for other, length in self._regions.items()):
            raise ValueError(f"expected a region beside the others, got one at {start:#x} that overlaps")
        self._regions[start] = size
        insort(self._free, (start, size, start))

    def remove(self, region: int) -> int:
        """Let go of an idle region; returns its bytes.

        Raises
        ------
        ValueError
            If part of it is taken, or there is no such region.
        """
        if region not in self.idle:
            raise ValueError(f"expected a region of which nothing is taken, got {region:#x}")
        size = self._regions.pop(region)
        self._free.remove((region, size, region))
        return size

    def allocate(self, size: int) -> int | None:
        """The address of a block of :func:`block_bytes` (`size`) bytes; None if no free block is large enough."""
        size = block_bytes(size)
        unit = SMALL if size < LARGE else LARGE
        best: tuple[int, int] | None = None  # bytes, place in the list
        for place, (start, length, _) in enumerate(self._free):
            if -(-start // unit) * unit + size <= start + length and (best is None or length < best[0]):
                best = (length, place)
        if best is None:
            return None
        start, length, region = self._free.pop(best[1])
        begin = -(-start // unit) * unit
        # Before and behind: what alignment and size leave over.
        for left, right in ((start, begin), (begin + size, start + length)):
            if left < right:
                insort(self._free, (left, right - left, region))
        self._taken[begin] = (size, region)
        self.used += size
        return begin

    def free(self, start: int) -> None:
        """Give a block back.

        Raises
        ------
        ValueError
            If no taken block begins there.
        """
        if start not in self._taken:
            raise ValueError(f"expected the address of a taken block, got {start:#x}")
        size, region = self._taken.pop(start)
        self.used -= size
        place = bisect_left(self._free, (start, 0, 0))
        if place < len(self._free) and self._free[place][0] == start + size and self._free[place][2] == region:
            size += self._free.pop(place)[1]
        if place > 0:
            before, length, owner = self._free[place - 1]
            if before + length == start and owner == region:
                start, size = before, length + size
                self._free.pop(place - 1)
        insort(self._free, (start, size, region))
