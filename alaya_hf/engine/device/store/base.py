"""What the device engine asks of a layer's exact store."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from alaya_hf.kernels.gpu.copies import copy_parts
from alaya_hf.kernels.gpu.store_format import StoreFormat
from alaya_hf.kernels.gpu.store_table import StoreTable


class LayerStore(ABC):
    """Lines of exact tokens of every row of one layer, in host memory that the device reads and writes.

    Parameters
    ----------
    kv_heads : int
    form : StoreFormat
        Of a line.
    device : torch.device
        That kernels run on.
    """

    def __init__(self, kv_heads: int, form: StoreFormat, device: torch.device) -> None:
        self.kv_heads, self.form, self.device = kv_heads, form, device

    @property
    @abstractmethod
    def lines(self) -> int:
        """Lines that every row has room for."""

    @property
    @abstractmethod
    def view(self) -> Tensor | StoreTable:
        """The store as kernels take it: the same object while it is the same memory."""

    @property
    def table(self) -> bool:
        """Whether kernels find the lines through a table."""
        return isinstance(self.view, StoreTable)

    @abstractmethod
    def grow(self, lines: int, capacity: int, used: Sequence[int], layers: int, wait: Callable[[], None]) -> None:
        """Make room for `lines` lines, of which the first ``used[row]`` of each row keep what they hold.

        Parameters
        ----------
        lines, capacity : int
            What is needed, and what there should be room for so that it need not grow again soon.
        used : sequence of int
        layers : int
            Layers that are about to need as much.
        wait : callable
            Waits for what the device still writes to this layer's lines.

        Raises
        ------
        HostMemoryError, PoolFullError
            The lines are where they were then.
        """

    @abstractmethod
    def take(self, rows: Sequence[int], used: Sequence[int], wait: Callable[[], None]) -> LayerStore:
        """A store whose row ``i`` has the first ``used[rows[i]]`` lines of row ``rows[i]``, and as much room.

        Raises
        ------
        HostMemoryError, PoolFullError
        """

    def open(self, used: Sequence[int]) -> None:  # noqa: B027  (nothing to do where nothing is shared)
        """The lines from ``used[row]`` on are about to be written: nobody else may see that."""

    @abstractmethod
    def pieces(self, row: int, start: int, stop: int) -> list[Tensor]:
        """Lines of a row where they lie, in order: ``[kv_heads, parts, n, *form.tail]`` each, views in the order of
        :meth:`buffer`, the parts of a piece at even distances."""

    @abstractmethod
    def buffer(self, tokens: int) -> Tensor:
        """``[kv_heads, tokens, *form.tail]`` on the device, in the store's order: copies between the two are runs of bytes."""

    @abstractmethod
    def pack(self, keys: Tensor, values: Tensor) -> Tensor:
        """``[kv_heads, n, head_dim]`` twice as lines of the store: ``[kv_heads, n, *form.tail]`` in its order."""

    def write(self, row: int, start: int, rows: Tensor) -> None:
        """Write lines from :meth:`pack`, in the order of the current stream, without waiting for it."""
        for piece, part in zip_pieces(self.pieces(row, start, start + rows.shape[1]), rows):
            copy_lines(piece, part)


def zip_pieces(pieces: Sequence[Tensor], rows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Each piece ``[kv_heads, parts, n, ...]`` and what belongs to it of rows ``[kv_heads, tokens, ...]``, as a view alike."""
    begin = 0
    for piece in pieces:
        parts, size = piece.shape[1:3]
        yield piece, rows[:, begin : begin + parts * size].unflatten(1, (parts, size))
        begin += parts * size


def token_major(piece: Tensor) -> bool:
    """Whether the heads of a token of ``[kv_heads, parts, n, ...]`` lie side by side, and not the tokens of a head."""
    return piece.shape[0] > 1 and piece.stride(0) < piece.stride(2)


def copy_lines(target: Tensor, source: Tensor) -> None:
    """Copy ``[kv_heads, parts, n, ...]`` between host and device as runs of bytes, both in the same order."""
    if token_major(source):
        copy_parts(target.movedim(0, 2), source.movedim(0, 2))
        return
    # One copy per KV head, whose parts are contiguous on both sides.
    for to, part in zip(target, source, strict=True):
        copy_parts(to, part)
