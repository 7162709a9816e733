"""Free runs of a line of units: best fit, neighbours joined again when they come back."""

from __future__ import annotations

from bisect import bisect_left, insort


class FreeRuns:
    """Which runs of consecutive units are free. Units are what the caller makes of them: bytes, blocks, pages.

    Runs never span two regions, not even neighbouring ones.

    Attributes
    ----------
    total : int
        Free units.

    Notes
    -----
    Best fit with immediate coalescing (Knuth, TAOCP 1, 2.5). The runs are kept twice, in the order of their starts to find
    neighbours and in the order of their sizes to find the best fit (the heap of FlowKV, arXiv 2504.03775, which also lets
    runs leave from the middle): a search is logarithmic in the number of runs, a change moves that many pointers.
    """

    def __init__(self) -> None:
        self.total = 0
        self._regions: set[int] = set()
        self._starts: list[int] = []
        self._length: dict[int, int] = {}
        self._sizes: list[tuple[int, int]] = []  # size, start

    def __len__(self) -> int:
        return len(self._starts)

    @property
    def largest(self) -> int:
        """Units of the largest free run, 0 if there is none."""
        return self._sizes[-1][0] if self._sizes else 0

    def copy(self) -> FreeRuns:
        """The same runs, changing apart from these. Linear in their number."""
        other = FreeRuns()
        other.total, other._regions = self.total, set(self._regions)
        other._starts, other._sizes, other._length = list(self._starts), list(self._sizes), dict(self._length)
        return other

    def length(self, start: int) -> int:
        """Units of the free run that begins at ``start``, 0 if none does."""
        return self._length.get(start, 0)

    def add(self, start: int, size: int) -> None:
        """Take a region in, all of it free."""
        self._regions.add(start)
        self._put(start, size)

    def remove(self, start: int) -> int:
        """Let go of the region at ``start``, all of which has to be free; returns its units."""
        size = self._cut(start)
        self._regions.remove(start)
        return size

    def take(self, size: int, align: int = 1) -> int | None:
        """The start of ``size`` units, a multiple of ``align``, out of the smallest run that holds them; None if none does."""
        for place in range(bisect_left(self._sizes, (size, -1)), len(self._sizes)):
            length, start = self._sizes[place]
            begin = -(-start // align) * align
            if begin + size <= start + length:
                self._split(start, begin, size)
                return begin
        return None

    def take_at(self, start: int, most: int) -> int:
        """Take up to ``most`` units of the run that begins at ``start``; returns how many, 0 if no run begins there."""
        size = min(most, self.length(start))
        if size:
            self._split(start, start, size)
        return size

    def take_pieces(self, size: int) -> list[tuple[int, int]]:
        """``size`` units in as few runs as best fit finds: one if one is large enough, else the largest and so on.

        Returns
        -------
        list of (start, units)

        Raises
        ------
        ValueError
            If fewer than ``size`` units are free; nothing is taken then.
        """
        if size > self.total:
            raise ValueError(f"expected at most the {self.total:,} free units, got {size:,}")
        pieces = []
        while size:
            piece = min(size, self.largest)
            start = self.take(piece)
            assert start is not None
            pieces.append((start, piece))
            size -= piece
        return pieces

    def give(self, start: int, size: int) -> None:
        """Bring units back.

        Raises
        ------
        ValueError
            If some of them are free already.
        """
        place = bisect_left(self._starts, start)
        after = self._starts[place] if place < len(self._starts) else None
        before = self._starts[place - 1] if place else None
        if (after is not None and after < start + size) or (
            before is not None and start < before + self._length[before]
        ):
            raise ValueError(f"expected units that are taken, got {size:,} at {start:,}, of which some are free")
        if after == start + size and after not in self._regions:
            size += self._cut(after)
        if before is not None and before + self._length[before] == start and start not in self._regions:
            size += self._cut(before)
            start = before
        self._put(start, size)

    def _split(self, start: int, begin: int, size: int) -> None:
        end = start + self._cut(start)
        for left, right in ((start, begin), (begin + size, end)):
            if left < right:
                self._put(left, right - left)

    def _put(self, start: int, size: int) -> None:
        insort(self._starts, start)
        insort(self._sizes, (size, start))
        self._length[start] = size
        self.total += size

    def _cut(self, start: int) -> int:
        size = self._length.pop(start)
        del self._starts[bisect_left(self._starts, start)]
        del self._sizes[bisect_left(self._sizes, (size, start))]
        self.total -= size
        return size
