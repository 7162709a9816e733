"""Blocks of a few large regions: best fit, neighbours joined again when they come back."""

from __future__ import annotations

from alaya_hf.storage.runs import FreeRuns

SMALL, LARGE = 1 << 12, 1 << 21
"""Sizes and addresses are multiples of `SMALL` bytes (a page), those of blocks from `LARGE` bytes on of `LARGE` (a huge page)."""


def block_bytes(size: int) -> int:
    """Bytes of the block that serves `size` bytes, at least one page."""
    unit = SMALL if size < LARGE else LARGE
    return max(1, -(-size // unit)) * unit


class BlockAllocator:
    """Which bytes of which region are taken. Knows addresses only and touches no memory.

    Blocks never span two regions, not even neighbouring ones: each region is registered with CUDA by itself.
    """

    def __init__(self) -> None:
        self._regions: dict[int, int] = {}  # start -> size
        self._free = FreeRuns()
        self._taken: dict[int, int] = {}  # start -> size
        self.used = 0

    @property
    def held(self) -> int:
        """Bytes of all regions."""
        return sum(self._regions.values())

    @property
    def largest(self) -> int:
        """Bytes of the largest free block."""
        return self._free.largest

    @property
    def idle(self) -> list[int]:
        """Starts of the regions of which nothing is taken."""
        return [start for start, size in self._regions.items() if self._free.length(start) == size]

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
        self._free.add(start, size)

    def remove(self, region: int) -> int:
        """Let go of an idle region; returns its bytes.

        Raises
        ------
        ValueError
            If part of it is taken, or there is no such region.
        """
        if region not in self.idle:
            raise ValueError(f"expected a region of which nothing is taken, got {region:#x}")
        del self._regions[region]
        return self._free.remove(region)

    def allocate(self, size: int) -> int | None:
        """The address of a block of :func:`block_bytes` (`size`) bytes; None if no free block is large enough."""
        size = block_bytes(size)
        start = self._free.take(size, SMALL if size < LARGE else LARGE)
        if start is not None:
            self._taken[start] = size
            self.used += size
        return start

    def free(self, start: int) -> None:
        """Give a block back.

        Raises
        ------
        ValueError
            If no taken block begins there.
        """
        if start not in self._taken:
            raise ValueError(f"expected the address of a taken block, got {start:#x}")
        size = self._taken.pop(start)
        self.used -= size
        self._free.give(start, size)
