"""The offloaded part of one layer's context: for every batch row a list of segments."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from alaya_hf.storage.segment import Segment


@dataclass
class Piece:
    """The first ``length`` tokens of a segment, as seen by one batch row."""

    segment: Segment
    length: int

    @property
    def kv(self) -> Tensor:
        """``[kv_heads, length, 2, head_dim]``, a view, safe to read as a whole."""
        return self.segment.read(0, self.length)

    @property
    def view(self) -> Tensor:
        """The same view for readers of a few tokens, who call ``segment.check`` first."""
        return self.segment.view[:, : self.length]


class HostStore:
    """Keys and values in host memory, shared between rows.

    A row is a list of pieces. Rows with equal content share their segments; reordering, repeating and selecting rows
    moves references only. Appending writes in place where a row is the only reader of its last segment and starts a new
    segment otherwise (copy-on-write without the copy).

    Parameters
    ----------
    batch, kv_heads, head_dim : int
    dtype : torch.dtype
        Of the stored vectors.
    """

    def __init__(self, batch: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
        self.kv_heads, self.head_dim, self.dtype = kv_heads, head_dim, dtype
        self.rows: list[list[Piece]] = [[] for _ in range(batch)]

    def length(self, row: int) -> int:
        """Tokens that a row has here."""
        return sum(piece.length for piece in self.rows[row])

    @property
    def lengths(self) -> list[int]:
        """Tokens of every row."""
        return [self.length(row) for row in range(len(self.rows))]

    @property
    def segments(self) -> list[Segment]:
        """Every segment once."""
        return list({id(piece.segment): piece.segment for row in self.rows for piece in row}.values())

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values, shared segments counted once."""
        return sum(segment.nbytes for segment in self.segments)

    def _may_write(self, piece: Piece, rows: list[int]) -> bool:
        """Whether nobody but ``rows`` reads the piece's segment, and they read all of it."""
        if piece.segment.shared or piece.length != piece.segment.used:
            return False
        return not any(
            other.segment is piece.segment
            for row, pieces in enumerate(self.rows)
            if row not in rows
            for other in pieces
        )

    def append(self, keys: list[Tensor], values: list[Tensor], queries: list[Tensor] | None = None) -> int:
        """Append tokens to every row.

        Parameters
        ----------
        keys, values : list of Tensor
            One ``[kv_heads, m, head_dim]`` per row; ``m`` may differ and may be 0.
        queries : list of Tensor, optional
            Sampled query vectors of these tokens, one ``[kv_heads, s, head_dim]`` float32 per row.

        Returns
        -------
        int
            Bytes written. Rows whose content was and stays equal are written once.
        """
        written = 0
        for rows in self._equal_rows(keys, values):
            leader = rows[0]
            pieces = self.rows[leader]
            tokens = keys[leader].shape[1]
            if not pieces or not self._may_write(pieces[-1], rows):
                pieces.append(Piece(Segment(self.kv_heads, self.head_dim, self.dtype), 0))
            piece = pieces[-1]
            piece.segment.append(keys[leader], values[leader])
            piece.length += tokens
            if queries is not None:
                piece.segment.add_samples(queries[leader])
            written += self.kv_heads * tokens * 2 * self.head_dim * self.dtype.itemsize
            for row in rows[1:]:
                self.rows[row] = [Piece(piece.segment, piece.length) for piece in pieces]
        return written

    def _equal_rows(self, keys: list[Tensor], values: list[Tensor]) -> list[list[int]]:
        """Rows that append something, grouped by equal content before and after."""
        before = [[(id(piece.segment), piece.length) for piece in row] for row in self.rows]
        groups: list[list[int]] = []
        for row in range(len(self.rows)):
            if keys[row].shape[1] == 0:
                continue
            for group in groups:
                first = group[0]
                if (
                    before[first] == before[row]
                    and _equal(keys[first], keys[row])
                    and _equal(values[first], values[row])
                ):
                    group.append(row)
                    break
            else:
                groups.append([row])
        return groups

    def take_last(self, row: int, tokens: int) -> Tensor:
        """Remove the last tokens of a row and return them: ``[kv_heads, tokens, 2, head_dim]``, a copy."""
        taken: list[Tensor] = []
        pieces = self.rows[row]
        while tokens:
            piece = pieces[-1]
            count = min(tokens, piece.length)
            taken.insert(0, piece.segment.read(piece.length - count, piece.length).clone())
            sole = self._may_write(piece, [row])
            piece.length -= count
            if sole:
                piece.segment.truncate(piece.length)
            if piece.length == 0:
                pieces.pop()
            tokens -= count
        if not taken:
            return torch.empty(self.kv_heads, 0, 2, self.head_dim, dtype=self.dtype)
        return torch.cat(taken, dim=1)

    def select(self, indices: list[int]) -> None:
        """Row ``i`` becomes what row ``indices[i]`` was. Moves references only."""
        self.rows = [[Piece(piece.segment, piece.length) for piece in self.rows[index]] for index in indices]


def _equal(a: Tensor, b: Tensor) -> bool:
    # The last token tells most unequal rows apart without reading the rest.
    return a.shape == b.shape and torch.equal(a[:, -1], b[:, -1]) and torch.equal(a, b)
