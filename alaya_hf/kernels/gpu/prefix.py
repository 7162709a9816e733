"""Where a place's exact row lies when a run of a context stays in a mapped file: there, or in the engine's own store."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from alaya_hf.kernels.gpu.op import check
from alaya_hf.kernels.gpu.store_format import StoreFormat

BOUNDS = 3  # numbers per row


class Prefix(NamedTuple):
    """A run of places whose rows lie in memory that all rows of a batch share and nobody writes to.

    Places ``first <= place < last`` of a row are token ``place + origin`` of it. The own store holds the other places side by
    side: place ``last`` follows place ``first - 1`` there.

    Attributes
    ----------
    rows : Tensor ``[kv_heads, tokens, 2, head_dim]``
        In the model's dtype, contiguous; mapped host memory through
        :func:`~alaya_hf.kernels.gpu.host_memory.device_view`.
    bounds : Tensor ``[batch, 3]`` int64
        ``first, last, origin`` of every row, on the device: kernels read them, so that a captured step stays valid when they
        change.
    fetch : callable, optional
        While kernels cannot read the run: brings the rows that were selected, given ids and counts. May wait for the device.
    """

    rows: Tensor | None
    bounds: Tensor
    fetch: Callable[[Tensor, Tensor], Tensor] | None = None

    def selected(self, ids: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """`prefix` and `bounds` of :func:`~alaya_hf.kernels.gpu.gather.gather_attention` for these selected places.

        Parameters
        ----------
        ids : Tensor ``[batch, kv_heads, rows, cap]`` int32
        counts : Tensor ``[batch, kv_heads, rows]`` int32
        """
        rows = self.rows if self.fetch is None else self.fetch(ids, counts)
        assert rows is not None
        return rows, self.bounds

    def own_lines(self, row: int, places: Tensor) -> tuple[Tensor, Tensor]:
        """Lines of the own store of some places (int64), and which of the places it has. In plain torch, for checking."""
        first, last, _ = self.bounds[row].tolist()
        return torch.where(places >= last, places - (last - first), places), (places < first) | (places >= last)

    def place_rows(self, row: int, own: Tensor, tokens: int) -> Tensor:
        """The rows of places 0 to ``tokens - 1``, zero where there are none. In plain torch, for checking.

        Parameters
        ----------
        own : Tensor ``[kv_heads, capacity, 2, head_dim]``
            The row's own store.
        """
        first, last, origin = self.bounds[row].tolist()
        assert self.rows is not None
        result = torch.zeros(own.shape[0], tokens, *own.shape[2:], dtype=own.dtype, device=own.device)
        stop = min(last, tokens)
        if first < stop:
            result[:, first:stop] = self.rows[:, first + origin : stop + origin].to(own.device)
        places = torch.arange(tokens)
        lines, mine = self.own_lines(row, places)
        mine &= lines < own.shape[1]
        result[:, places[mine].to(own.device)] = own[:, lines[mine].to(own.device)]
        return result


def check_prefix(
    rows: Tensor | None, bounds: Tensor | None, form: StoreFormat, batch: int, heads: int, ids: Tensor | None = None
) -> None:
    """Raise where a kernel's prefix is not what :class:`Prefix` promises; with `ids`, it may be the selected rows only.

    Raises
    ------
    ValueError
    """
    if (rows is None) != (bounds is None):
        raise ValueError("expected rows and bounds of a prefix together, got one of them")
    if rows is None or bounds is None:
        return
    if form.scaled:
        raise ValueError(f"expected a store in the model's dtype beside a prefix, got one of {form.dtype}")
    selected = ids is not None and rows.dim() == ids.dim() + len(form.tail)
    check(
        rows,
        "prefix",
        (*ids.shape, *form.tail) if selected and ids is not None else (heads, None, *form.tail),
        form.dtype,
    )
    check(bounds, "bounds", (batch, BOUNDS), torch.int64)


@triton.jit
def locate(bounds, row, place):  # type: ignore[no-untyped-def]
    """Line of the own store, whether the place lies in the prefix instead, and its token there; see :class:`Prefix`."""
    first = tl.load(bounds + row * 3)
    last = tl.load(bounds + row * 3 + 1)
    origin = tl.load(bounds + row * 3 + 2)
    behind = place >= last
    return place - tl.where(behind, last - first, 0), (place >= first) & (place < last), place + origin


__all__ = ["BOUNDS", "Prefix", "check_prefix", "locate"]
